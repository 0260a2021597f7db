//! Meeting through etcd (v3): the agents elect the host of the coordinator and the store, and elect another when its node is lost.
//!
//! | key, under `<prefix>/<run id>/` | value | lease |
//! |---|---|---|
//! | `leader` | `host:port` of the coordinator | as long as a silent agent is waited for |
//! | `state` | the coordinator's record, as JSON | minutes; after the end seconds |
//!
//! The leader key is made in a transaction that finds it missing, and every record is written in one that finds it as its writer made it,
//! and the record before as its writer knows it: what an earlier attempt sent may arrive after a later one.
//! A coordinator whose key is gone can therefore write nothing, and nobody hears of a round before its record is written: of two that
//! both believe to lead, one starts rounds. A coordinator also ends when it has not heard from etcd for as long as its lease lasts.
//!
//! Agents speak etcd's gRPC by h2 and a few messages of their own: `docs/design/0001-etcd-without-protoc.md`
//! says why.

mod client;
pub(super) mod endpoint;
mod fault;
mod grpc;
mod messages;
mod protobuf;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use self::client::Client;
use self::fault::Fault;
use self::messages::{Compare, Found, Get, Put, Txn};
use super::{EtcdConfig, EtcdTls, MeetingConfig, Patience, Session};
use crate::host::{Entry, Listening, Takeover};
use crate::machine::Record;
use crate::{Error, Host, address};

/// How often an agent looks for a coordinator while there is none.
const RETRY: Duration = Duration::from_millis(200);
/// How long the record of a job without any coordinator is kept, and longer where agents look for one for longer.
const ABANDONED: i64 = 600;
/// The longest lease that etcd grants, in seconds.
const LONGEST: i64 = 9_000_000_000;
/// How long late agents are told that a job is over.
const OVER: i64 = 30;

/// This agent as the coordinator's host.
pub(super) struct Leadership {
    pub(super) host: Host,
    client: Client,
    lease: i64,
    /// How long etcd may take.
    answer: Duration,
    /// Keeps the lease and the records.
    task: JoinHandle<()>,
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Leadership {
    /// Makes way for another at once.
    pub(super) async fn resign(mut self) {
        self.task.abort();
        let _ = timeout(self.answer, self.client.lease_revoke(self.lease)).await;
    }
}

/// One agent's way through etcd.
pub(super) struct Etcd<'a> {
    config: &'a EtcdConfig,
    common: &'a MeetingConfig,
    client: Client,
}

impl<'a> Etcd<'a> {
    /// Asks etcd nothing yet.
    pub(super) fn new(config: &'a EtcdConfig, common: &'a MeetingConfig) -> Result<Self, Error> {
        let client = Client::new(config, common.answer).map_err(|problem| Error::Refused {
            problem: format!("etcd at {}: {problem}", config.endpoints.join(", ")),
        })?;
        Ok(Self { config, common, client })
    }

    /// Finds the coordinator, or becomes its host, and says hello.
    pub(super) async fn meet(
        &mut self,
        hello: &Hello,
    ) -> Result<(Session, (String, u16), Option<Leadership>), Error> {
        let deadline = Instant::now() + self.common.join_timeout;
        let mut leadership = None;
        loop {
            let last = match self.leader().await {
                Ok(Some((host, port))) => {
                    let left = deadline.saturating_duration_since(Instant::now()).min(self.common.answer);
                    let patience = Patience::wait(left).answer(left);
                    let (local, token) = (self.common.local, self.common.token.as_ref());
                    match Session::connect((&host, port), local, hello.clone(), token, patience).await {
                        Ok(session) => return Ok((session, (host, port), leadership)),
                        Err(error @ Error::Token { .. }) => return Err(error),
                        // It is gone, and its lease is not over.
                        Err(error) => error,
                    }
                }
                Ok(None) => match self.campaign().await {
                    Ok(won) => {
                        leadership = won.or(leadership);
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if matches!(last, Error::Bind { .. } | Error::Host(_) | Error::Refused { .. })
                || Instant::now() >= deadline
            {
                return Err(last);
            }
            tracing::debug!(error = %last, "no coordinator yet");
            sleep(RETRY).await;
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.config.prefix.trim_end_matches('/'), self.common.run_id)
    }

    async fn leader(&mut self) -> Result<Option<(String, u16)>, Error> {
        let found = self.client.get(&self.key("leader")).await;
        let found = found.map_err(|fault| failure(self.config, &fault))?;
        let Some(kv) = found.first() else { return Ok(None) };
        let address = std::str::from_utf8(&kv.value).ok().and_then(split);
        match address {
            Some(address) => Ok(Some(address)),
            None => Err(Error::Refused {
                problem: format!(
                    "the key {} of etcd does not hold an address: remove it",
                    self.key("leader")
                ),
            }),
        }
    }

    /// Becomes the host, unless another was faster.
    async fn campaign(&mut self) -> Result<Option<Leadership>, Error> {
        let address = self.address().await?;
        let listening = Listening::bind(&[address], self.config.port)?;
        let config = self.common.host(vec![address], listening.port);
        let etcd = |fault: Fault| failure(self.config, &fault);
        let ttl = lease_seconds(self.common.keep_alive);
        let (leader, state) = (self.key("leader"), self.key("state"));
        let started = Instant::now();
        let lease = self.client.lease_grant(ttl).await.map_err(etcd)?;
        let value = SocketAddr::new(address, listening.port).to_string();
        let answer = self.client.txn(&election(&leader, &value, lease)).await.map_err(etcd)?;
        let revision = if answer.succeeded {
            answer.revision
        } else {
            // An earlier attempt may have been heard, and its answer lost.
            let found = answer.found(0).and_then(Found::first);
            let Some(ours) = found.filter(|kv| kv.lease == lease) else {
                let _ = self.client.lease_revoke(lease).await;
                return Ok(None);
            };
            ours.create_revision
        };
        let record = self.client.get(&state).await.map_err(etcd)?;
        let written = record.first().map_or(0, |kv| kv.mod_revision);
        let record = match record.first().map(|kv| serde_json::from_slice::<Record>(&kv.value)) {
            None => None,
            Some(Ok(record)) => Some(record),
            Some(Err(error)) => {
                let problem = format!("the key {state} of etcd is of another release ({error}): remove it");
                let _ = self.client.lease_revoke(lease).await;
                return Err(Error::Refused { problem });
            }
        };
        let looking = i64::try_from(self.common.join_timeout.as_secs()).unwrap_or(i64::MAX);
        let keeping = looking.saturating_add(ttl).clamp(ABANDONED, LONGEST);
        let kept = self.client.lease_grant(keeping).await.map_err(etcd)?;
        let (ledger, entries) = mpsc::channel(1);
        let (ttl, answer) = (Duration::from_secs(ttl.unsigned_abs()), self.common.answer);
        let client = self.client.clone();
        let office = Office { client, leader, state, revision, written, lease, kept, ttl, answer };
        let task = tokio::spawn(office.hold(entries, started + ttl));
        let host = Host::serve(listening, config, Some(Takeover { record, ledger }))?;
        Ok(Some(Leadership { host, client: self.client.clone(), lease, answer: self.common.answer, task }))
    }

    /// The address that other nodes reach this one at: the one that it reaches etcd from, unless that is its own loopback.
    async fn address(&self) -> Result<IpAddr, Error> {
        if let Some(local) = self.common.local {
            return Ok(local);
        }
        for endpoint in self.client.endpoints() {
            for peer in address::resolve(&endpoint.host, endpoint.port).await.into_iter().flatten() {
                if let Some(source) = address::source_of(peer).filter(|source| !source.is_loopback()) {
                    return Ok(source);
                }
            }
        }
        let own = address::own();
        Ok(own.iter().copied().find(|address| !address.is_loopback()).unwrap_or(IpAddr::from([127, 0, 0, 1])))
    }
}

/// What a leader does for its office.
struct Office {
    client: Client,
    leader: String,
    state: String,
    /// The leader key is ours while it was created by this revision.
    revision: i64,
    /// The revision that wrote the record; 0 where there is none.
    written: i64,
    lease: i64,
    /// The lease of the record.
    kept: i64,
    ttl: Duration,
    /// How long etcd may take.
    answer: Duration,
}

impl Office {
    /// Keeps the leases and the records until the office is lost. The lease lasts until `until`, whatever is not heard from etcd.
    async fn hold(mut self, mut entries: mpsc::Receiver<Entry>, mut until: Instant) {
        let mut ticks = interval(self.ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let sent = Instant::now();
                    match timeout(self.ttl / 3, self.renew()).await {
                        Ok(Ok(true)) => until = sent + self.ttl,
                        Ok(Ok(false)) => return tracing::warn!("another coordinator may have taken over"),
                        Ok(Err(error)) => tracing::warn!(%error, "etcd does not answer"),
                        Err(_) => tracing::warn!("etcd does not answer"),
                    }
                }
                entry = entries.recv() => match entry {
                    Some(entry) => {
                        let kept = self.keep(&entry.record, until).await;
                        let _ = entry.kept.send(kept);
                        if !kept {
                            return;
                        }
                    }
                    None => return,
                },
                () = sleep_until(until) => return tracing::warn!("etcd was not reached for {:?}", self.ttl),
            }
        }
    }

    /// Whether both leases are still there.
    async fn renew(&mut self) -> Result<bool, Fault> {
        for lease in [self.lease, self.kept] {
            if !self.client.lease_keep_alive(lease).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes a record while the leader key is ours; tries again while the lease lasts.
    async fn keep(&mut self, record: &Record, until: Instant) -> bool {
        let Ok(json) = serde_json::to_vec(record) else { return false };
        while Instant::now() < until {
            match timeout(self.answer, self.write(&json, record.is_closed())).await {
                Ok(Ok(ours)) => return ours,
                Ok(Err(error)) => tracing::warn!(%error, "etcd does not answer"),
                Err(_) => tracing::warn!("etcd does not answer"),
            }
            sleep(RETRY).await;
        }
        false
    }

    async fn write(&mut self, json: &[u8], is_closed: bool) -> Result<bool, Fault> {
        let lease = if is_closed { self.client.lease_grant(OVER).await? } else { self.kept };
        let (leader, state) = (self.leader.clone(), self.state.clone());
        let txn = Txn {
            compare: vec![
                Compare::Created { key: leader.clone(), by: self.revision },
                Compare::Written { key: state.clone(), by: self.written },
            ],
            success: vec![Put { key: state.clone(), value: json.into(), lease }],
            failure: vec![Get { key: leader }, Get { key: state }],
        };
        let answer = self.client.txn(&txn).await?;
        if answer.succeeded {
            self.written = answer.revision;
            return Ok(true);
        }
        // An earlier attempt may have been heard, and its answer lost.
        let (Some(leader), Some(state)) = (answer.found(0), answer.found(1)) else { return Ok(false) };
        let ours = leader.first().is_some_and(|kv| kv.create_revision == self.revision);
        let Some(kv) = state.first().filter(|kv| ours && kv.value == json) else { return Ok(false) };
        self.written = kv.mod_revision;
        Ok(true)
    }
}

/// Makes the leader key if it is missing, and else looks at the one that is there.
fn election(leader: &str, value: &str, lease: i64) -> Txn {
    let key = leader.to_owned();
    Txn {
        compare: vec![Compare::Created { key: key.clone(), by: 0 }],
        success: vec![Put { key: key.clone(), value: value.into(), lease }],
        failure: vec![Get { key }],
    }
}

/// etcd counts in seconds, and gives no lease below its own election timeout.
fn lease_seconds(keep_alive: KeepAlive) -> i64 {
    let time = keep_alive.interval * keep_alive.attempts;
    (time.as_secs_f64().ceil() as i64).max(2)
}

fn split(address: &str) -> Option<(String, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host.trim_start_matches('[').trim_end_matches(']').to_owned(), port.parse().ok()?))
}

fn failure(config: &EtcdConfig, fault: &Fault) -> Error {
    let endpoints = config.endpoints.join(", ");
    let problem = fault.to_string();
    if fault.is_final() {
        return Error::Refused { problem: format!("etcd at {endpoints}: {problem}") };
    }
    Error::Etcd { endpoints, problem }
}

#[cfg(test)]
mod tests;
