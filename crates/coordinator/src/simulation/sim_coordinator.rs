//! A coordinator on its simulated host: its clock, its lease, and its record, which is written
//! before the messages that follow from it are sent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ice_proto::rendezvous::{Round, ToAgent, ToCoordinator};

use super::cluster::{Cluster, SimEvent};
use super::etcd::{Request, TTL};
use super::network::{End, Item};
use crate::{Action, Coordinator, Event, Peer, Record, Settings};

const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
pub(super) const LAST_CALL: u64 = 30_000;
/// Timeout of calls to etcd.
const ANSWER: u64 = 5000;

pub(super) struct SimCoordinator {
    term: u64,
    coordinator: Coordinator,
    /// The coordinator's time at the start of this one, and the host's.
    before: Duration,
    start: u64,
    /// Agents that it believes to be connected.
    known: BTreeSet<Peer>,
    /// Connected members of the last round.
    members: BTreeSet<Peer>,
    /// Members that have not received the end of the last round.
    live: BTreeSet<Peer>,
    /// The running round, and the time since which the coordinator waits for nodes, by the host's
    /// clock.
    running: Option<u64>,
    since: u64,
    log: Option<RecordLog>,
    events: VecDeque<Event>,
    /// Scheduled time of the coordinator's next tick.
    tick: Option<u64>,
}

/// State of the coordinator's key and record in etcd.
struct RecordLog {
    leader: u64,
    state: u64,
    /// End of the lease by the host's clock.
    until: u64,
    last: Option<Record>,
    pending: Option<PendingWrite>,
}

/// A record being written, and the actions that wait for it.
struct PendingWrite {
    attempt: u64,
    record: Record,
    actions: Vec<Action>,
    was_closed: bool,
}

impl SimCoordinator {
    fn now(&self, local: u64) -> Duration {
        self.before + Duration::from_millis(local - self.start)
    }

    /// Returns the host's time of a time of the coordinator.
    fn local(&self, at: Duration) -> u64 {
        let passed = at.saturating_sub(self.before).as_nanos().div_ceil(1_000_000);
        self.start + u64::try_from(passed).unwrap_or(u64::MAX / 4)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.coordinator.is_closed()
    }
}

/// A won election.
pub(super) struct Election {
    pub(super) term: u64,
    pub(super) leader: u64,
    pub(super) state: u64,
    pub(super) record: Option<Record>,
    /// Time of the request, by the host's clock.
    pub(super) sent: u64,
}

impl Cluster {
    /// Starts a coordinator. Without an election it is at the endpoint that all agents know.
    pub(super) fn elect(&mut self, host: usize, election: Option<Election>) {
        let term = election.as_ref().map_or_else(|| self.next_number(), |election| election.term);
        let settings = Settings {
            run_id: "job".into(),
            join_timeout: JOIN_TIMEOUT,
            last_call: Duration::from_millis(LAST_CALL),
            run_stamp: format!("stamp{term}"),
        };
        let start = self.local(host);
        let mut log = None;
        let mut record = None;
        if let Some(Election { leader, state, record: found, sent, .. }) = election {
            let until = sent + TTL;
            log = Some(RecordLog { leader, state, until, last: None, pending: None });
            record = found;
            self.schedule(self.now, SimEvent::Renew { host, term });
            let over = self.agents[host].clock.real(until);
            self.schedule(over, SimEvent::LeaseOver { host, term });
        }
        let before = record.as_ref().map_or(Duration::ZERO, Record::now);
        let coordinator = match record {
            Some(record) => Coordinator::resume(settings, record),
            None => Coordinator::new(settings),
        };
        self.agents[host].coordinator = Some(SimCoordinator {
            term,
            coordinator,
            before,
            start,
            known: BTreeSet::new(),
            members: BTreeSet::new(),
            live: BTreeSet::new(),
            running: None,
            since: start,
            log,
            events: VecDeque::new(),
            tick: None,
        });
        self.work(host);
    }

    fn coordinator(&mut self, host: usize, term: u64) -> Option<&mut SimCoordinator> {
        self.agents[host].coordinator.as_mut().filter(|sim| sim.term == term)
    }

    /// Queues an event for the coordinator. Events wait while a record is being written.
    pub(super) fn feed(&mut self, host: usize, event: Event) {
        if let Some(sim) = &mut self.agents[host].coordinator {
            sim.events.push_back(event);
            self.work(host);
        }
    }

    fn work(&mut self, host: usize) {
        loop {
            let local = self.local(host);
            let Some(sim) = &mut self.agents[host].coordinator else { return };
            if sim.log.as_ref().is_some_and(|log| log.pending.is_some()) {
                return;
            }
            let Some(event) = sim.events.pop_front() else { break };
            match &event {
                Event::Message(peer, ToCoordinator::Hello(_)) => _ = sim.known.insert(*peer),
                Event::Message(peer, ToCoordinator::Leave { .. }) | Event::Lost(peer) => {
                    sim.known.remove(peer);
                    sim.live.remove(peer);
                    sim.members.remove(peer);
                }
                Event::Message(..) | Event::Tick => {}
            }
            let now = sim.now(local);
            let was_closed = sim.is_closed();
            let actions = sim.coordinator.handle(now, event);
            for action in &actions {
                match action {
                    Action::Send(_, ToAgent::RoundStarted(round)) => sim.running = Some(round.number),
                    Action::Send(_, ToAgent::RoundBroken { round, .. })
                        if sim.running.take_if(|running| running == round).is_some() =>
                    {
                        sim.since = local;
                    }
                    Action::Send(_, ToAgent::Closed { reason, .. }) => {
                        let waited = Duration::from_millis(local - sim.since) >= JOIN_TIMEOUT;
                        assert!(waited || !reason.contains("nodes came within"), "RV-9: {reason}");
                    }
                    _ => {}
                }
            }
            let record = sim.coordinator.record(now);
            let attempt = self.next_number();
            match self.agents[host].coordinator.as_mut().and_then(|sim| sim.log.as_mut()) {
                Some(log) if log.last.as_ref().is_none_or(|last| !last.differs_only_in_time(&record)) => {
                    log.last = Some(record.clone());
                    log.pending = Some(PendingWrite { attempt, record, actions, was_closed });
                    self.write_record(host);
                }
                _ => self.perform(host, actions, was_closed),
            }
        }
        let clock = self.agents[host].clock;
        let Some(sim) = &mut self.agents[host].coordinator else { return };
        let due = sim.coordinator.deadline().map(|due| clock.real(sim.local(due)));
        if due != sim.tick {
            sim.tick = due;
            let term = sim.term;
            if let Some(due) = due {
                self.schedule(due, SimEvent::Tick { host, term });
            }
        }
    }

    pub(super) fn tick(&mut self, host: usize, term: u64) {
        let local = self.local(host);
        let Some(sim) = self.coordinator(host, term) else { return };
        sim.tick = None;
        if sim.coordinator.deadline().is_some_and(|due| sim.local(due) <= local) {
            sim.events.push_back(Event::Tick);
        }
        self.work(host);
    }

    fn write_record(&mut self, host: usize) {
        let clock = self.agents[host].clock;
        let Some(sim) = &self.agents[host].coordinator else { return };
        let term = sim.term;
        let Some((log, pending)) = sim.log.as_ref().and_then(|it| Some((it, it.pending.as_ref()?))) else {
            return;
        };
        let (leader, state, attempt) = (log.leader, log.state, pending.attempt);
        let record = pending.record.clone();
        self.ask_etcd(host, Request::Write { host, term, attempt, leader, state, record });
        let again = clock.real(self.local(host) + ANSWER);
        self.schedule(again, SimEvent::Rewrite { host, term, attempt });
    }

    pub(super) fn rewrite(&mut self, host: usize, term: u64, attempt: u64) {
        let Some(log) = self.coordinator(host, term).and_then(|sim| sim.log.as_mut()) else {
            return;
        };
        if log.pending.as_ref().is_some_and(|pending| pending.attempt == attempt) {
            self.write_record(host);
        }
    }

    pub(super) fn written(&mut self, host: usize, term: u64, attempt: u64, state: Option<u64>) {
        let Some(log) = self.coordinator(host, term).and_then(|sim| sim.log.as_mut()) else {
            return;
        };
        let Some(pending) = log.pending.take_if(|pending| pending.attempt == attempt) else { return };
        match state {
            Some(state) => {
                log.state = state;
                self.perform(host, pending.actions, pending.was_closed);
                self.work(host);
            }
            None => self.stop_coordinator(host, "another may have been elected"),
        }
    }

    /// Performs the coordinator's actions, and checks RV-5, RV-7 and RV-8.
    fn perform(&mut self, host: usize, actions: Vec<Action>, was_closed: bool) {
        let local = self.local(host);
        let Some(sim) = &mut self.agents[host].coordinator else { return };
        let term = sim.term;
        let record = sim.coordinator.record(sim.now(local));
        let mut started: BTreeMap<Peer, Round> = BTreeMap::new();
        for action in &actions {
            match action {
                Action::Send(peer, ToAgent::RoundStarted(round)) => {
                    started.insert(*peer, round.clone());
                }
                Action::Send(peer, ToAgent::RoundBroken { .. } | ToAgent::Closed { .. }) => {
                    sim.live.remove(peer);
                }
                Action::Close(peer) => {
                    sim.known.remove(peer);
                    sim.live.remove(peer);
                    sim.members.remove(peer);
                }
                _ => {}
            }
        }
        if !started.is_empty() {
            assert!(!was_closed, "RV-5");
            assert!(sim.live.is_empty(), "RV-7: {:?} are still in the last round", sim.live);
            let peers: BTreeSet<Peer> = started.keys().copied().collect();
            let dropped: Vec<_> = sim.members.difference(&peers).collect();
            assert!(dropped.is_empty(), "RV-8: {dropped:?} were dropped");
            (sim.live, sim.members) = (peers.clone(), peers);
            let who = |peer: &Peer| {
                self.network
                    .connections
                    .get(peer)
                    .map(|connection| (connection.agent, connection.incarnation))
            };
            let round_check: Vec<_> = started.iter().map(|(peer, round)| (who(peer), round)).collect();
            self.history.started(self.now, term, &self.job, &round_check);
        }
        for action in actions {
            match action {
                Action::Send(peer, message) => {
                    if let ToAgent::Closed { success, .. } = &message {
                        self.history.closed(&record, *success);
                    }
                    self.send(peer, End::Agent, Item::ToAgent(message));
                }
                Action::Close(peer) => self.close_end(peer, End::Server),
                Action::ClearStore => {}
            }
        }
    }

    pub(super) fn renew(&mut self, host: usize, term: u64) {
        let clock = self.agents[host].clock;
        let local = self.local(host);
        let Some(log) = self.coordinator(host, term).and_then(|sim| sim.log.as_ref()) else {
            return;
        };
        // One request at a time.
        if log.pending.is_none() {
            self.ask_etcd(host, Request::Renew { host, term, sent: local });
        }
        self.schedule(clock.real(local + TTL / 3), SimEvent::Renew { host, term });
    }

    pub(super) fn renewed(&mut self, host: usize, term: u64, is_active: bool, sent: u64) {
        let Some(log) = self.coordinator(host, term).and_then(|sim| sim.log.as_mut()) else {
            return;
        };
        if !is_active {
            self.stop_coordinator(host, "its lease is over");
            return;
        }
        log.until = log.until.max(sent + TTL);
    }

    pub(super) fn lease_over(&mut self, host: usize, term: u64) {
        let (local, clock) = (self.local(host), self.agents[host].clock);
        let Some(log) = self.coordinator(host, term).and_then(|sim| sim.log.as_ref()) else {
            return;
        };
        match log.until {
            until if until <= local => self.stop_coordinator(host, "its lease is over by its own clock"),
            until => self.schedule(clock.real(until), SimEvent::LeaseOver { host, term }),
        }
    }

    /// Stops a coordinator, and closes its connections.
    pub(super) fn stop_coordinator(&mut self, host: usize, why: &str) {
        let Some(sim) = self.agents[host].coordinator.take() else { return };
        self.trace(|| format!("coordinator {} ends: {why}", sim.term));
        let own = |(_, connection): &(&Peer, &super::network::Connection)| connection.term == sim.term;
        let peers: Vec<Peer> = self.network.connections.iter().filter(own).map(|(peer, _)| *peer).collect();
        peers.into_iter().for_each(|peer| self.close_end(peer, End::Server));
    }

    /// Ends the term of a coordinator whose host is done.
    pub(super) fn resign(&mut self, host: usize, term: u64) {
        if self.coordinator(host, term).is_none() {
            return;
        }
        self.stop_coordinator(host, "its host leaves");
        if self.job.kind == super::Discovery::Etcd {
            self.ask_etcd(host, Request::Revoke { term });
        }
    }

    pub(super) fn resign_if_idle(&mut self, host: usize, term: u64) {
        let is_here = |connection: &super::network::Connection| {
            connection.term == term && connection.is_open(End::Server)
        };
        if self.agents[host].is_done() && !self.network.connections.values().any(is_here) {
            self.schedule(self.now, SimEvent::Resign { host, term });
        }
    }
}

impl SimCoordinator {
    pub(super) fn term(&self) -> u64 {
        self.term
    }
}
