//! Random faults.

use std::collections::BTreeSet;

use super::cluster::Cluster;

impl Cluster {
    /// Picks the victim of a fault; the coordinator's host more often than others.
    fn victim(&mut self) -> usize {
        let leads = match self.job.kind {
            super::Discovery::Etcd => self.etcd.leads(),
            super::Discovery::Endpoint => Some(0),
        };
        let likely = if self.job.kind == super::Discovery::Etcd { 40 } else { 10 };
        match leads {
            Some(host) if self.random.chance(likely) => host,
            _ => self.random.below(self.agents.len() as u64) as usize,
        }
    }

    /// Picks the length of a fault: from a moment to longer than any timeout.
    fn lasts(&mut self) -> u64 {
        let longest = self.random.pick(&[1000, 10_000, 25_000, 60_000]);
        100 + self.random.below(longest)
    }

    pub(super) fn fault(&mut self) {
        let victim = self.victim();
        let everybody: BTreeSet<usize> = (0..self.agents.len()).collect();
        let (alone, etcd) = (BTreeSet::from([victim]), BTreeSet::from([self.etcd_host()]));
        let both_ways = self.random.chance(80);
        let is_up = self.agents[victim].incarnation > 0;
        match self.random.below(12) {
            0 | 1 if is_up => self.die(victim, false),
            2 if is_up => self.die(victim, true),
            // The network drops a connection.
            3 => {
                if let Some(peer) = self.agents[victim].link {
                    self.trace(|| format!("connection {peer} of agent {victim} breaks"));
                    self.break_connection(peer);
                }
            }
            4 => {
                let lasts = self.lasts();
                self.trace(|| format!("host {victim} is cut off from the others for {lasts}"));
                let others = everybody.into_iter().filter(|host| *host != victim).collect();
                self.cut(alone, others, both_ways, lasts);
            }
            5 => {
                let lasts = self.lasts();
                self.trace(|| format!("host {victim} is cut off from etcd for {lasts}"));
                self.cut(alone, etcd, both_ways, lasts);
            }
            // A part of the cluster is cut off, with or without etcd.
            6 | 7 => {
                let lasts = self.lasts();
                let part: BTreeSet<usize> =
                    (0..=self.etcd_host()).filter(|_| self.random.chance(40)).collect();
                let rest = (0..=self.etcd_host()).filter(|host| !part.contains(host)).collect();
                self.trace(|| format!("{part:?} are cut off from {rest:?} for {lasts}"));
                self.cut(part, rest, both_ways, lasts);
            }
            8 | 9 => {
                let (lasts, machine) = (self.lasts(), self.random.chance(50));
                self.suspend(victim, lasts, machine);
            }
            10 => {
                let lasts = self.lasts();
                self.trace(|| format!("etcd is away for {lasts}"));
                self.cut(everybody, etcd, both_ways, lasts);
            }
            11 if self.random.chance(50) => self.stop_requested(victim),
            _ => {}
        }
    }

    /// Ends all faults.
    pub(super) fn stop_faults(&mut self) {
        self.trace(|| "nothing goes wrong any more".into());
        self.heal_all();
        (0..self.agents.len()).for_each(|host| self.wake(host));
    }
}
