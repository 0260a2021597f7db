//! The simulated cluster, its time, and its events.

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::rendezvous::RestartPolicy;

use super::Discovery;
use super::agent::Agent;
use super::checks::History;
use super::etcd::{Answer, Etcd, Request};
use super::network::{End, Network};
use crate::Peer;
use ice_testing::Random;

/// An event. Numbers of terms, searches, commands and silences are unique, so events of an earlier
/// one are ignored.
#[derive(Debug)]
pub(super) enum SimEvent {
    /// An agent starts.
    Start {
        host: usize,
    },
    /// An agent makes an attempt to find the coordinator.
    Seek {
        host: usize,
        seek: u64,
    },
    /// An agent connects to the coordinator.
    Connect {
        host: usize,
        seek: u64,
        to: usize,
        term: u64,
    },
    AtEtcd(Box<Request>),
    FromEtcd {
        host: usize,
        answer: Box<Answer>,
    },
    /// An item of a connection arrives.
    Deliver {
        peer: Peer,
        to: End,
    },
    /// An end has heard nothing for too long.
    Silence {
        peer: Peer,
        end: End,
        stamp: u64,
    },
    /// The coordinator's deadline may have come.
    Tick {
        host: usize,
        term: u64,
    },
    /// The coordinator renews its lease, or the lease ends by its own clock.
    Renew {
        host: usize,
        term: u64,
    },
    LeaseOver {
        host: usize,
        term: u64,
    },
    /// A record may not have reached etcd.
    Rewrite {
        host: usize,
        term: u64,
        attempt: u64,
    },
    /// The coordinator's host has waited long enough for the other agents.
    Resign {
        host: usize,
        term: u64,
    },
    /// The ranks of an agent end by themselves.
    RanksEnd {
        host: usize,
        epoch: u64,
        succeeds: bool,
    },
    /// The ranks of an agent have stopped.
    Stopped {
        host: usize,
        epoch: u64,
    },
    Fault,
    Heal {
        cut: u64,
    },
    Wake {
        host: usize,
    },
}

/// The job of a run.
pub(super) struct Job {
    pub(super) kind: Discovery,
    pub(super) nnodes: (u32, u32),
    pub(super) restarts: RestartPolicy,
    /// Time that ranks take if they do not fail.
    pub(super) work: u64,
    pub(super) faults_until: u64,
}

pub(super) struct Cluster {
    pub(super) random: Random,
    pub(super) now: u64,
    numbers: u64,
    scheduled: BTreeMap<(u64, u64), SimEvent>,
    pub(super) job: Job,
    pub(super) agents: Vec<Agent>,
    pub(super) network: Network,
    pub(super) etcd: Etcd,
    pub(super) history: History,
    traced: bool,
}

impl Cluster {
    pub(super) fn new(seed: u64, traced: bool) -> Self {
        let mut random = Random::new(seed);
        // Usually few nodes, sometimes hundreds.
        let count = if random.chance(2) { 100 + random.below(200) } else { 1 + random.below(8) };
        let max_nodes = 1 + random.below(count + 2);
        let min_nodes = 1 + random.below(max_nodes);
        let fixed = random.chance(30);
        let ranked = fixed && random.chance(50);
        let restarts = RestartPolicy {
            max_restarts: random.below(7) as u32,
            window: None,
            backoff: Duration::from_millis(random.below(20_000)),
            crash_loop: 0,
        };
        let job = Job {
            kind: if random.chance(70) { Discovery::Etcd } else { Discovery::Endpoint },
            nnodes: (if fixed { max_nodes } else { min_nodes } as u32, max_nodes as u32),
            restarts,
            // Most jobs are still running when the faults end.
            work: if random.chance(30) { 60_000 } else { 700_000 },
            faults_until: 300_000,
        };
        let agents = (0..count as usize)
            .map(|host| Agent::new(&mut random, (ranked && (host as u64) < max_nodes).then_some(host as u32)))
            .collect();
        let mut cluster = Self {
            random,
            now: 0,
            numbers: 0,
            scheduled: BTreeMap::new(),
            job,
            agents,
            network: Network::default(),
            etcd: Etcd::default(),
            history: History::default(),
            traced,
        };
        for host in 0..cluster.agents.len() {
            let late = if cluster.random.chance(80) { 5000 } else { 200_000 };
            let at = cluster.random.below(late);
            cluster.schedule(at, SimEvent::Start { host });
        }
        let mut at = 0;
        for _ in 0..cluster.random.below(16) {
            // Faults seldom come alone.
            at = match cluster.random.chance(40) {
                true => at + cluster.random.below(20_000),
                false => cluster.random.below(cluster.job.faults_until),
            };
            cluster.schedule(at.min(cluster.job.faults_until - 1), SimEvent::Fault);
        }
        cluster
    }

    /// Returns a unique number.
    pub(super) fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn schedule(&mut self, at: u64, event: SimEvent) {
        let number = self.next_number();
        self.scheduled.insert((at.max(self.now), number), event);
    }

    /// Schedules an event after `least`, plus a random time below `more`.
    pub(super) fn schedule_in(&mut self, least: u64, more: u64, event: SimEvent) {
        let at = self.now + least + self.random.below(more);
        self.schedule(at, event);
    }

    /// Runs until this time, or until no event is scheduled.
    pub(super) fn run(&mut self, until: u64) {
        while let Some(entry) = self.scheduled.first_entry() {
            let (at, _) = *entry.key();
            if at > until {
                self.now = until;
                return;
            }
            let event = entry.remove();
            self.now = at;
            assert!(at < 24 * 3_600_000, "RV-6: the job does not end");
            self.dispatch(event);
        }
    }

    /// Returns the host whose process must be awake for an event.
    fn process_of(&self, event: &SimEvent) -> Option<usize> {
        match event {
            SimEvent::Start { .. }
            | SimEvent::AtEtcd(_)
            | SimEvent::Fault
            | SimEvent::Heal { .. }
            | SimEvent::Wake { .. } => None,
            SimEvent::Deliver { peer, to: end } | SimEvent::Silence { peer, end, .. } => {
                self.network.host_of(*peer, *end)
            }
            SimEvent::Seek { host, .. }
            | SimEvent::Connect { host, .. }
            | SimEvent::FromEtcd { host, .. }
            | SimEvent::Tick { host, .. }
            | SimEvent::Renew { host, .. }
            | SimEvent::LeaseOver { host, .. }
            | SimEvent::Rewrite { host, .. }
            | SimEvent::Resign { host, .. }
            | SimEvent::RanksEnd { host, .. }
            | SimEvent::Stopped { host, .. } => Some(*host),
        }
    }

    fn dispatch(&mut self, event: SimEvent) {
        if let Some(agent) = self.process_of(&event).map(|host| &mut self.agents[host])
            && agent.asleep
        {
            agent.deferred.push(event);
            return;
        }
        match event {
            SimEvent::Start { host } => self.start(host),
            SimEvent::Seek { host, seek } => self.seek(host, seek),
            SimEvent::Connect { host, seek, to, term } => self.connect(host, seek, to, term),
            SimEvent::AtEtcd(request) => self.at_etcd(*request),
            SimEvent::FromEtcd { host, answer } => self.hear_from_etcd(host, *answer),
            SimEvent::Deliver { peer, to } => self.deliver(peer, to),
            SimEvent::Silence { peer, end, stamp } => self.silence(peer, end, stamp),
            SimEvent::Tick { host, term } => self.tick(host, term),
            SimEvent::Renew { host, term } => self.renew(host, term),
            SimEvent::LeaseOver { host, term } => self.lease_over(host, term),
            SimEvent::Rewrite { host, term, attempt } => self.rewrite(host, term, attempt),
            SimEvent::Resign { host, term } => self.resign(host, term),
            SimEvent::RanksEnd { host, epoch, succeeds } => self.ranks_end(host, epoch, succeeds),
            SimEvent::Stopped { host, epoch } => self.stopped(host, epoch),
            SimEvent::Fault => self.fault(),
            SimEvent::Heal { cut } => self.heal(cut),
            SimEvent::Wake { host } => self.wake(host),
        }
    }

    /// Prints a line of the trace when a single seed is replayed.
    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        if self.traced {
            println!("{:>7.3} {}", self.now as f64 / 1000.0, what());
        }
    }

    /// Returns the time of a host's clock.
    pub(super) fn local(&self, host: usize) -> u64 {
        self.agents[host].clock.local(self.now)
    }
}
