//! Model of etcd: the leader key with its lease, and the record. It handles one request after
//! another, by a correct clock.

use super::cluster::{Cluster, SimEvent};
use crate::Record;

/// Length of the leader's lease.
pub(super) const TTL: u64 = 15_000;
/// Maximum delay until etcd notices an expired lease.
const LOOKS: u64 = 1000;
/// Lease of the record of a closed job.
const OVER: u64 = 30_000;
/// Lease of the record of an open job.
const ABANDONED: u64 = 600_000;
const LATENCY: u64 = 50;
/// Maximum delay of a request that was sent while the network was cut.
const LATE: u64 = 8000;

struct Leader {
    host: usize,
    term: u64,
    /// Revision of etcd that created it.
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
    /// Requests that the cut network holds back, with their senders.
    held: Vec<(usize, Request)>,
}

/// A request to etcd, with its sender.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is boxed where it waits")]
pub(super) enum Request {
    /// Reads the leader key, or creates it if it is missing.
    Find {
        host: usize,
        seek: u64,
        sent: u64,
    },
    Renew {
        host: usize,
        term: u64,
        sent: u64,
    },
    /// Writes a record if the leader key and the last record are as the writer left them.
    Write {
        host: usize,
        term: u64,
        attempt: u64,
        leader: u64,
        state: u64,
        record: Record,
    },
    /// Revokes the lease.
    Revoke {
        term: u64,
    },
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is boxed where it waits")]
pub(super) enum Answer {
    Leader { seek: u64, host: usize, term: u64 },
    Elected { seek: u64, term: u64, leader: u64, state: u64, record: Option<Record>, sent: u64 },
    Renewed { term: u64, is_active: bool, sent: u64 },
    Written { term: u64, attempt: u64, state: Option<u64> },
}

impl Etcd {
    /// Returns the host of the leader key.
    pub(super) fn leads(&self) -> Option<usize> {
        self.leader.as_ref().map(|leader| leader.host)
    }

    fn expire(&mut self, now: u64) {
        self.leader.take_if(|leader| leader.until <= now);
        self.state.take_if(|state| state.until <= now);
    }
}

impl Cluster {
    pub(super) fn ask_etcd(&mut self, host: usize, request: Request) {
        if self.network.reaches(host, self.etcd_host()) {
            self.schedule_in(1, LATENCY, SimEvent::AtEtcd(Box::new(request)));
        } else {
            self.etcd.held.push((host, request));
        }
    }

    /// Delivers held requests late, or never.
    pub(super) fn send_held(&mut self) {
        for (host, request) in std::mem::take(&mut self.etcd.held) {
            if !self.network.reaches(host, self.etcd_host()) {
                self.etcd.held.push((host, request));
            } else if self.random.chance(50) {
                self.schedule_in(1, LATE, SimEvent::AtEtcd(Box::new(request)));
            }
        }
    }

    pub(super) fn at_etcd(&mut self, request: Request) {
        let (now, looks) = (self.now, self.random.below(LOOKS));
        self.etcd.expire(now);
        let (host, answer) = match request {
            Request::Find { host, seek, sent } => match &self.etcd.leader {
                Some(Leader { host: at, term, .. }) => {
                    (host, Answer::Leader { seek, host: *at, term: *term })
                }
                None => {
                    let term = self.next_number();
                    self.etcd.revision += 1;
                    let leader = self.etcd.revision;
                    let until = now + TTL + looks;
                    self.etcd.leader = Some(Leader { host, term, revision: leader, until });
                    let state = self.etcd.state.as_ref();
                    let (state, record) =
                        (state.map_or(0, |state| state.revision), state.map(|state| state.record.clone()));
                    self.trace(|| format!("host {host} is elected: {term}"));
                    (host, Answer::Elected { seek, term, leader, state, record, sent })
                }
            },
            Request::Renew { host, term, sent } => {
                let own = self.etcd.leader.as_mut().filter(|leader| leader.term == term);
                let is_active = own.is_some();
                if let Some(leader) = own {
                    leader.until = now + TTL + looks;
                    if let Some(state) = self.etcd.state.as_mut().filter(|state| !state.record.is_closed()) {
                        state.until = now + ABANDONED;
                    }
                }
                (host, Answer::Renewed { term, is_active, sent })
            }
            Request::Write { host, term, attempt, leader, state, record } => {
                (host, Answer::Written { term, attempt, state: self.write(leader, state, record) })
            }
            Request::Revoke { term } => {
                self.etcd.leader.take_if(|leader| leader.term == term);
                return;
            }
        };
        if self.network.reaches(self.etcd_host(), host) {
            self.schedule_in(1, LATENCY, SimEvent::FromEtcd { host, answer: Box::new(answer) });
        }
    }

    /// Writes a record. Returns its revision, including one that an earlier attempt wrote.
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
