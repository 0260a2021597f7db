//! Time, and everything that happens in it.

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::rendezvous::RestartPolicy;

use super::super::random::Random;
use super::Kind;
use super::agent::Agent;
use super::checks::History;
use super::etcd::{Answer, Etcd, Request};
use super::network::{End, Network};
use crate::machine::Peer;

/// Something that happens. Numbers of offices, searches and the like are used once, so that what was meant for an earlier one is dropped.
#[derive(Debug)]
pub(super) enum Happening {
    /// An agent is started.
    Start {
        host: usize,
    },
    /// It looks for the coordinator.
    Seek {
        host: usize,
        seek: u64,
    },
    /// It knocks.
    Connect {
        host: usize,
        seek: u64,
        to: usize,
        office: u64,
    },
    AtEtcd(Box<Request>),
    FromEtcd {
        host: usize,
        answer: Box<Answer>,
    },
    /// What was sent arrives.
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
    /// The coordinator's time may have come.
    Tick {
        host: usize,
        office: u64,
    },
    /// The coordinator renews its lease, or its lease is over by its own clock.
    Renew {
        host: usize,
        office: u64,
    },
    LeaseOver {
        host: usize,
        office: u64,
    },
    /// etcd may not have heard of a record.
    Rewrite {
        host: usize,
        office: u64,
        attempt: u64,
    },
    /// Its host has waited long enough for the others.
    Resign {
        host: usize,
        office: u64,
    },
    /// The ranks of an agent end by themselves, well or not.
    RanksEnd {
        host: usize,
        epoch: u64,
        well: bool,
    },
    /// The ranks of an agent have been stopped.
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

/// What is run.
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) nnodes: (u32, u32),
    pub(super) restarts: RestartPolicy,
    /// How long ranks take that do not fail.
    pub(super) work: u64,
    pub(super) faults_until: u64,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) now: u64,
    numbers: u64,
    planned: BTreeMap<(u64, u64), Happening>,
    pub(super) job: Job,
    pub(super) agents: Vec<Agent>,
    pub(super) network: Network,
    pub(super) etcd: Etcd,
    pub(super) history: History,
    told: bool,
}

impl World {
    pub(super) fn new(seed: u64, told: bool) -> Self {
        let mut random = Random::new(seed);
        // Mostly few nodes, now and then hundreds.
        let count = if random.chance(2) { 100 + random.below(200) } else { 1 + random.below(8) };
        let most = 1 + random.below(count + 2);
        let fewest = 1 + random.below(most);
        let fixed = random.chance(30);
        let ranked = fixed && random.chance(50);
        let restarts = RestartPolicy {
            max_restarts: random.below(7) as u32,
            window: None,
            backoff: Duration::from_millis(random.below(20_000)),
            crash_loop: 0,
        };
        let job = Job {
            kind: if random.chance(70) { Kind::Etcd } else { Kind::Endpoint },
            nnodes: (if fixed { most } else { fewest } as u32, most as u32),
            restarts,
            // Most jobs are still running when the faults are over.
            work: if random.chance(30) { 60_000 } else { 700_000 },
            faults_until: 300_000,
        };
        let agents = (0..count as usize)
            .map(|host| Agent::new(&mut random, (ranked && (host as u64) < most).then_some(host as u32)))
            .collect();
        let mut world = Self {
            random,
            now: 0,
            numbers: 0,
            planned: BTreeMap::new(),
            job,
            agents,
            network: Network::default(),
            etcd: Etcd::default(),
            history: History::default(),
            told,
        };
        for host in 0..world.agents.len() {
            let late = if world.random.chance(80) { 5000 } else { 200_000 };
            let at = world.random.below(late);
            world.plan(at, Happening::Start { host });
        }
        let mut at = 0;
        for _ in 0..world.random.below(16) {
            // They seldom come alone.
            at = match world.random.chance(40) {
                true => at + world.random.below(20_000),
                false => world.random.below(world.job.faults_until),
            };
            world.plan(at.min(world.job.faults_until - 1), Happening::Fault);
        }
        world
    }

    /// A number that was not used before.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn plan(&mut self, at: u64, happening: Happening) {
        let number = self.number();
        self.planned.insert((at.max(self.now), number), happening);
    }

    /// After so long, and up to as much again.
    pub(super) fn plan_in(&mut self, least: u64, more: u64, happening: Happening) {
        let at = self.now + least + self.random.below(more);
        self.plan(at, happening);
    }

    /// Runs until this time, or until nothing is planned any more.
    pub(super) fn run(&mut self, until: u64) {
        while let Some(entry) = self.planned.first_entry() {
            let (at, _) = *entry.key();
            if at > until {
                self.now = until;
                return;
            }
            let happening = entry.remove();
            self.now = at;
            assert!(at < 24 * 3_600_000, "RV-6: the job does not end");
            self.happen(happening);
        }
    }

    /// Whose process must be awake for it.
    fn process(&self, happening: &Happening) -> Option<usize> {
        match happening {
            Happening::Start { .. }
            | Happening::AtEtcd(_)
            | Happening::Fault
            | Happening::Heal { .. }
            | Happening::Wake { .. } => None,
            Happening::Deliver { peer, to: end } | Happening::Silence { peer, end, .. } => {
                self.network.host_of(*peer, *end)
            }
            Happening::Seek { host, .. }
            | Happening::Connect { host, .. }
            | Happening::FromEtcd { host, .. }
            | Happening::Tick { host, .. }
            | Happening::Renew { host, .. }
            | Happening::LeaseOver { host, .. }
            | Happening::Rewrite { host, .. }
            | Happening::Resign { host, .. }
            | Happening::RanksEnd { host, .. }
            | Happening::Stopped { host, .. } => Some(*host),
        }
    }

    fn happen(&mut self, happening: Happening) {
        if let Some(agent) = self.process(&happening).map(|host| &mut self.agents[host])
            && agent.asleep
        {
            agent.deferred.push(happening);
            return;
        }
        match happening {
            Happening::Start { host } => self.start(host),
            Happening::Seek { host, seek } => self.seek(host, seek),
            Happening::Connect { host, seek, to, office } => self.connect(host, seek, to, office),
            Happening::AtEtcd(request) => self.at_etcd(*request),
            Happening::FromEtcd { host, answer } => self.hear_from_etcd(host, *answer),
            Happening::Deliver { peer, to } => self.deliver(peer, to),
            Happening::Silence { peer, end, stamp } => self.silence(peer, end, stamp),
            Happening::Tick { host, office } => self.tick(host, office),
            Happening::Renew { host, office } => self.renew(host, office),
            Happening::LeaseOver { host, office } => self.lease_over(host, office),
            Happening::Rewrite { host, office, attempt } => self.rewrite(host, office, attempt),
            Happening::Resign { host, office } => self.resign(host, office),
            Happening::RanksEnd { host, epoch, well } => self.ranks_end(host, epoch, well),
            Happening::Stopped { host, epoch } => self.stopped(host, epoch),
            Happening::Fault => self.fault(),
            Happening::Heal { cut } => self.heal(cut),
            Happening::Wake { host } => self.wake(host),
        }
    }

    /// Tells whoever replays a run.
    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        if self.told {
            println!("{:>7.3} {}", self.now as f64 / 1000.0, what());
        }
    }

    /// What a host's clock shows.
    pub(super) fn local(&self, host: usize) -> u64 {
        self.agents[host].clock.local(self.now)
    }
}
