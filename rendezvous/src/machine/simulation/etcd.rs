//! etcd: the leader's key with its lease, and the record. It serves one request after another, by a clock that is right.

use super::world::{Happening, World};
use crate::machine::Record;

/// How long a lease lasts that is not renewed.
pub(super) const TTL: u64 = 15_000;
/// etcd looks for leases that are over this often.
const LOOKS: u64 = 1000;
/// How long the record of a job that is over is kept.
const OVER: u64 = 30_000;
/// How long the record of a job without any coordinator is kept.
const ABANDONED: u64 = 600_000;
const LATENCY: u64 = 50;
/// How late a request may be that was sent while the network was cut.
const LATE: u64 = 8000;

struct Leader {
    host: usize,
    office: u64,
    /// Of etcd, when it was made.
    revision: u64,
    until: u64,
}

/// The record, and the revision that wrote it.
struct State {
    record: Record,
    revision: u64,
    until: u64,
}

#[derive(Default)]
pub(super) struct Etcd {
    leader: Option<Leader>,
    state: Option<State>,
    revision: u64,
    /// Requests that wait for the network.
    held: Vec<(usize, Request)>,
}

/// What is asked of etcd, and by whom.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is boxed where it waits")]
pub(super) enum Request {
    /// Where is the coordinator? If there is none, it is the one that asks.
    Find {
        host: usize,
        seek: u64,
        sent: u64,
    },
    Renew {
        host: usize,
        office: u64,
        sent: u64,
    },
    /// A record, while the leader's key and the last record are as their writer made them.
    Write {
        host: usize,
        office: u64,
        attempt: u64,
        leader: u64,
        state: u64,
        record: Record,
    },
    /// The lease is given back.
    Revoke {
        office: u64,
    },
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is boxed where it waits")]
pub(super) enum Answer {
    Leader { seek: u64, host: usize, office: u64 },
    Elected { seek: u64, office: u64, leader: u64, state: u64, record: Option<Record>, sent: u64 },
    Renewed { office: u64, is_there: bool, sent: u64 },
    Written { office: u64, attempt: u64, state: Option<u64> },
}

impl Etcd {
    /// Where the coordinator is, or was a moment ago.
    pub(super) fn leads(&self) -> Option<usize> {
        self.leader.as_ref().map(|leader| leader.host)
    }

    fn expire(&mut self, now: u64) {
        self.leader.take_if(|leader| leader.until <= now);
        self.state.take_if(|state| state.until <= now);
    }
}

impl World {
    pub(super) fn ask_etcd(&mut self, host: usize, request: Request) {
        if self.network.reaches(host, self.etcd_host()) {
            self.plan_in(1, LATENCY, Happening::AtEtcd(Box::new(request)));
        } else {
            self.etcd.held.push((host, request));
        }
    }

    /// What was sent while the network was cut arrives late, or never.
    pub(super) fn send_held(&mut self) {
        for (host, request) in std::mem::take(&mut self.etcd.held) {
            if !self.network.reaches(host, self.etcd_host()) {
                self.etcd.held.push((host, request));
            } else if self.random.chance(50) {
                self.plan_in(1, LATE, Happening::AtEtcd(Box::new(request)));
            }
        }
    }

    pub(super) fn at_etcd(&mut self, request: Request) {
        let (now, looks) = (self.now, self.random.below(LOOKS));
        self.etcd.expire(now);
        let (host, answer) = match request {
            Request::Find { host, seek, sent } => match &self.etcd.leader {
                Some(Leader { host: at, office, .. }) => {
                    (host, Answer::Leader { seek, host: *at, office: *office })
                }
                None => {
                    let office = self.number();
                    self.etcd.revision += 1;
                    let leader = self.etcd.revision;
                    let until = now + TTL + looks;
                    self.etcd.leader = Some(Leader { host, office, revision: leader, until });
                    let state = self.etcd.state.as_ref();
                    let (state, record) =
                        (state.map_or(0, |state| state.revision), state.map(|state| state.record.clone()));
                    self.tell(|| format!("host {host} is elected: {office}"));
                    (host, Answer::Elected { seek, office, leader, state, record, sent })
                }
            },
            Request::Renew { host, office, sent } => {
                let own = self.etcd.leader.as_mut().filter(|leader| leader.office == office);
                let is_there = own.is_some();
                if let Some(leader) = own {
                    leader.until = now + TTL + looks;
                    if let Some(state) = self.etcd.state.as_mut().filter(|state| !state.record.is_closed()) {
                        state.until = now + ABANDONED;
                    }
                }
                (host, Answer::Renewed { office, is_there, sent })
            }
            Request::Write { host, office, attempt, leader, state, record } => {
                (host, Answer::Written { office, attempt, state: self.write(leader, state, record) })
            }
            Request::Revoke { office } => {
                self.etcd.leader.take_if(|leader| leader.office == office);
                return;
            }
        };
        if self.network.reaches(self.etcd_host(), host) {
            self.plan_in(1, LATENCY, Happening::FromEtcd { host, answer: Box::new(answer) });
        }
    }

    /// The revision that wrote it, also where an earlier attempt did.
    fn write(&mut self, leader: u64, state: u64, record: Record) -> Option<u64> {
        if self.etcd.leader.as_ref().is_none_or(|current| current.revision != leader) {
            return None;
        }
        let last = self.etcd.state.as_ref();
        if last.map_or(0, |last| last.revision) != state {
            return last.filter(|last| last.record == record).map(|last| last.revision);
        }
        self.history.written(last.map(|last| &last.record), &record);
        self.etcd.revision += 1;
        let revision = self.etcd.revision;
        let until = self.now + if record.is_closed() { OVER } else { ABANDONED };
        self.etcd.state = Some(State { record, revision, until });
        Some(revision)
    }
}
