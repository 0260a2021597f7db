//! Rendezvous through etcd (v3): the agents elect the host of the coordinator and the store, and
//! elect another one when its node is lost.
//!
//! | key, under `<prefix>/<run id>/` | value | lease |
//! |---|---|---|
//! | `leader` | `host:port` of the coordinator | as long as a silent agent is waited for |
//! | `state` | the coordinator's record, as JSON | minutes; after the end seconds |
//!
//! The leader key is created in a transaction that requires it to be missing. Each record is
//! written in a transaction that requires the leader key and the previous record to be as their
//! writer left them, since an earlier attempt may arrive after a later one. So a coordinator
//! without its key can write nothing. No agent receives a round before its record is written, so of
//! two agents that both believe to lead, only one starts rounds. A coordinator also stops if etcd
//! has not answered for the length of its lease.
//!
//! Agents use etcd's gRPC through h2 and messages of their own:
//! `docs/design/0001-etcd-without-protoc.md` has the reasons.

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
use self::messages::{Compare, Get, GetResult, Put, Txn};
use super::{EtcdConfig, EtcdTls, RendezvousConfig, RetryPolicy, Session};
use crate::coordinator::Record;
use crate::server::{BoundListeners, Failover, PendingRecord};
use crate::{Error, Server, address};

/// Pause between two looks at the leader key.
const RETRY: Duration = Duration::from_millis(200);
/// Minimum lease in seconds of an open job's record. It is longer if agents search for a
/// coordinator for longer.
const ABANDONED_TTL: i64 = 600;
/// Maximum lease that etcd grants, in seconds.
const MAX_TTL: i64 = 9_000_000_000;
/// Lease in seconds of a closed job's record: late agents learn from it that the job is over.
const CLOSED_TTL: i64 = 30;

/// State of the agent that hosts the coordinator.
pub(super) struct Leadership {
    pub(super) host: Server,
    client: Client,
    lease: i64,
    /// Timeout of calls to etcd.
    answer_timeout: Duration,
    /// Task that renews the leases and writes the records.
    task: JoinHandle<()>,
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Leadership {
    /// Revokes the lease, so that another agent can lead at once.
    pub(super) async fn resign(mut self) {
        self.task.abort();
        let _ = timeout(self.answer_timeout, self.client.lease_revoke(self.lease)).await;
    }
}

/// An agent's search for the coordinator in etcd.
pub(super) struct Etcd<'a> {
    config: &'a EtcdConfig,
    common: &'a RendezvousConfig,
    client: Client,
    /// Lease of a campaign that has not ended in a leader. The leader key may exist with it, and
    /// then names a port on which this agent no longer listens.
    unused_lease: Option<i64>,
}

impl<'a> Etcd<'a> {
    /// Creates the search. It calls etcd later.
    pub(super) fn new(config: &'a EtcdConfig, common: &'a RendezvousConfig) -> Result<Self, Error> {
        let client = Client::new(config, common.answer_timeout).map_err(|problem| Error::Refused {
            problem: format!("etcd at {}: {problem}", config.endpoints.join(", ")),
        })?;
        Ok(Self { config, common, client, unused_lease: None })
    }

    /// Finds the coordinator or becomes its host, then connects and says hello.
    pub(super) async fn connect(
        &mut self,
        hello: &Hello,
    ) -> Result<(Session, (String, u16), Option<Leadership>), Error> {
        let deadline = Instant::now() + self.common.join_timeout;
        let mut leadership = None;
        loop {
            let last = match self.leader().await {
                Ok(Some((host, port))) => {
                    let left =
                        deadline.saturating_duration_since(Instant::now()).min(self.common.answer_timeout);
                    let retry = RetryPolicy::within(left).answer_timeout(left);
                    let (local, token) = (self.common.local, self.common.token.as_ref());
                    match Session::connect((&host, port), local, hello.clone(), token, retry).await {
                        Ok(session) => return Ok((session, (host, port), leadership)),
                        Err(error @ Error::Token { .. }) => return Err(error),
                        // The leader is gone, and its lease has not expired.
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
            if matches!(last, Error::Bind { .. } | Error::Serve(_) | Error::Refused { .. })
                || Instant::now() >= deadline
            {
                // Other agents would wait for the expiry of these leases.
                if let Some(leadership) = leadership {
                    leadership.resign().await;
                }
                let _ = self.revoke_unused_lease().await;
                return Err(last);
            }
            tracing::debug!(error = %last, "no coordinator yet");
            sleep(RETRY).await;
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.config.prefix.trim_end_matches('/'), self.common.run_id)
    }

    /// Deletes the leader key of a campaign that failed after its election. Otherwise all agents
    /// would wait until its lease expires, after 15 s by default.
    async fn revoke_unused_lease(&mut self) -> Result<(), Error> {
        let Some(lease) = self.unused_lease else { return Ok(()) };
        match self.client.lease_revoke(lease).await {
            Err(fault) if !fault.is_final() && !fault.is_missing() => {
                return Err(failure(self.config, &fault));
            }
            _ => self.unused_lease = None,
        }
        Ok(())
    }

    async fn leader(&mut self) -> Result<Option<(String, u16)>, Error> {
        self.revoke_unused_lease().await?;
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

    /// Becomes the leader and starts the server; returns `None` if another agent was faster.
    async fn campaign(&mut self) -> Result<Option<Leadership>, Error> {
        let address = self.address().await?;
        let listening = BoundListeners::bind(&[address], self.config.port)?;
        let config = self.common.host(vec![address], listening.port);
        let etcd = |fault: Fault| failure(self.config, &fault);
        let ttl = lease_seconds(self.common.keep_alive);
        let (leader, state) = (self.key("leader"), self.key("state"));
        let started = Instant::now();
        let lease = self.client.lease_grant(ttl).await.map_err(etcd)?;
        self.unused_lease = Some(lease);
        let value = SocketAddr::new(address, listening.port).to_string();
        let answer = self.client.txn(&election(&leader, &value, lease)).await.map_err(etcd)?;
        let revision = if answer.succeeded {
            answer.revision
        } else {
            // The response to an earlier attempt may have been lost after etcd executed it.
            let found = answer.found(0).and_then(GetResult::first);
            let Some(ours) = found.filter(|kv| kv.lease == lease) else { return Ok(None) };
            ours.create_revision
        };
        let record = self.client.get(&state).await.map_err(etcd)?;
        let written = record.first().map_or(0, |kv| kv.mod_revision);
        let record = match record.first().map(|kv| serde_json::from_slice::<Record>(&kv.value)) {
            None => None,
            Some(Ok(record)) => Some(record),
            Some(Err(error)) => {
                let problem = format!("the key {state} of etcd is of another release ({error}): remove it");
                return Err(Error::Refused { problem });
            }
        };
        let looking = i64::try_from(self.common.join_timeout.as_secs()).unwrap_or(i64::MAX);
        let keeping = looking.saturating_add(ttl).clamp(ABANDONED_TTL, MAX_TTL);
        let record_lease = self.client.lease_grant(keeping).await.map_err(etcd)?;
        let (log, records) = mpsc::channel(1);
        let (ttl, answer_timeout) = (Duration::from_secs(ttl.unsigned_abs()), self.common.answer_timeout);
        let client = self.client.clone();
        let keeper = LeaseKeeper {
            client,
            leader,
            state,
            revision,
            written,
            lease,
            record_lease,
            ttl,
            answer_timeout,
        };
        let task = tokio::spawn(keeper.run(records, started + ttl));
        let host = Server::serve(listening, config, Some(Failover { record, log }))?;
        self.unused_lease = None;
        Ok(Some(Leadership {
            host,
            client: self.client.clone(),
            lease,
            answer_timeout: self.common.answer_timeout,
            task,
        }))
    }

    /// Returns the address at which other nodes reach this one: the source address of connections
    /// to etcd, unless that is loopback.
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
        let own = address::own_addresses();
        Ok(own.iter().copied().find(|address| !address.is_loopback()).unwrap_or(IpAddr::from([127, 0, 0, 1])))
    }
}

/// The leader's task: it renews the leases, and writes the records.
struct LeaseKeeper {
    client: Client,
    leader: String,
    state: String,
    /// Revision that created the leader key. The key is this agent's while its create revision
    /// equals this one.
    revision: i64,
    /// Revision that wrote the record; 0 without one.
    written: i64,
    lease: i64,
    /// Lease of the record.
    record_lease: i64,
    ttl: Duration,
    /// Timeout of calls to etcd.
    answer_timeout: Duration,
}

impl LeaseKeeper {
    /// Renews the leases and writes the records until this agent no longer leads. Each renewal that
    /// etcd confirms extends `lease_until`, counted from the time when it was sent. If none is
    /// confirmed, the task ends at that time.
    async fn run(mut self, mut records: mpsc::Receiver<PendingRecord>, mut lease_until: Instant) {
        let mut ticks = interval(self.ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let sent = Instant::now();
                    match timeout(self.ttl / 3, self.renew()).await {
                        Ok(Ok(true)) => lease_until = sent + self.ttl,
                        Ok(Ok(false)) => return tracing::warn!("another coordinator may have taken over"),
                        Ok(Err(error)) => tracing::warn!(%error, "etcd does not answer"),
                        Err(_) => tracing::warn!("etcd does not answer"),
                    }
                }
                pending = records.recv() => match pending {
                    Some(pending) => {
                        let is_leader = self.keep(&pending.record, lease_until).await;
                        let _ = pending.acknowledge.send(is_leader);
                        if !is_leader {
                            return;
                        }
                    }
                    None => return,
                },
                () = sleep_until(lease_until) => return tracing::warn!("etcd was not reached for {:?}", self.ttl),
            }
        }
    }

    /// Renews both leases. Returns whether both still existed.
    async fn renew(&mut self) -> Result<bool, Fault> {
        for lease in [self.lease, self.record_lease] {
            if !self.client.lease_keep_alive(lease).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes a record. Retries until the lease is over. Returns whether this agent still leads.
    async fn keep(&mut self, record: &Record, lease_until: Instant) -> bool {
        let Ok(json) = serde_json::to_vec(record) else { return false };
        while Instant::now() < lease_until {
            match timeout(self.answer_timeout, self.write(&json, record.is_closed())).await {
                Ok(Ok(ours)) => return ours,
                Ok(Err(error)) => tracing::warn!(%error, "etcd does not answer"),
                Err(_) => tracing::warn!("etcd does not answer"),
            }
            sleep(RETRY).await;
        }
        false
    }

    async fn write(&mut self, json: &[u8], is_closed: bool) -> Result<bool, Fault> {
        let lease = if is_closed { self.client.lease_grant(CLOSED_TTL).await? } else { self.record_lease };
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
        // The response to an earlier attempt may have been lost after etcd executed it.
        let (Some(leader), Some(state)) = (answer.found(0), answer.found(1)) else { return Ok(false) };
        let ours = leader.first().is_some_and(|kv| kv.create_revision == self.revision);
        let Some(kv) = state.first().filter(|kv| ours && kv.value == json) else { return Ok(false) };
        self.written = kv.mod_revision;
        Ok(true)
    }
}

/// Returns the transaction that creates the leader key, or reads it if it exists.
fn election(leader: &str, value: &str, lease: i64) -> Txn {
    let key = leader.to_owned();
    Txn {
        compare: vec![Compare::Created { key: key.clone(), by: 0 }],
        success: vec![Put { key: key.clone(), value: value.into(), lease }],
        failure: vec![Get { key }],
    }
}

/// Returns the lease in whole seconds, as etcd counts. etcd raises a shorter lease to its election
/// timeout.
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
