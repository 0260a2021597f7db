//! A coordinator on its host: the clock that it goes by, its lease, and the record that is written before anybody hears of what is in it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ice_proto::rendezvous::{Round, ToAgent, ToCoordinator};

use super::etcd::{Request, TTL};
use super::network::{End, Item};
use super::world::{Happening, World};
use crate::machine::{Action, Coordinator, Event, Peer, Record, Settings};

const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
pub(super) const LAST_CALL: u64 = 30_000;
/// How long etcd may take for an answer.
const ANSWER: u64 = 5000;

pub(super) struct Office {
    number: u64,
    coordinator: Coordinator,
    /// The coordinator's clock when this one began, and the host's.
    before: Duration,
    start: u64,
    /// Agents that it believes to be there.
    known: BTreeSet<Peer>,
    /// Those of the last round that are.
    members: BTreeSet<Peer>,
    /// Those that were not told the end of it.
    live: BTreeSet<Peer>,
    /// The round that it started last, until that is broken, and since when it waits for nodes, by the host's clock.
    running: Option<u64>,
    since: u64,
    ledger: Option<Ledger>,
    events: VecDeque<Event>,
    /// When the coordinator wants to look at its clock.
    tick: Option<u64>,
}

/// What a coordinator has to do with etcd.
struct Ledger {
    leader: u64,
    state: u64,
    /// The lease lasts so long by the host's clock.
    until: u64,
    last: Option<Record>,
    writing: Option<Writing>,
}

/// A record on its way, and what is done once it is there.
struct Writing {
    attempt: u64,
    record: Record,
    actions: Vec<Action>,
    was_closed: bool,
}

impl Office {
    fn now(&self, local: u64) -> Duration {
        self.before + Duration::from_millis(local - self.start)
    }

    /// When the host's clock shows a time of the coordinator's.
    fn local(&self, at: Duration) -> u64 {
        let passed = at.saturating_sub(self.before).as_nanos().div_ceil(1_000_000);
        self.start + u64::try_from(passed).unwrap_or(u64::MAX / 4)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.coordinator.is_closed()
    }
}

/// An election that was won.
pub(super) struct Election {
    pub(super) office: u64,
    pub(super) leader: u64,
    pub(super) state: u64,
    pub(super) record: Option<Record>,
    /// When it was asked for, by the host's clock.
    pub(super) sent: u64,
}

impl World {
    /// A coordinator begins. One that was not elected is at an endpoint that all know.
    pub(super) fn found(&mut self, host: usize, election: Option<Election>) {
        let number = election.as_ref().map_or_else(|| self.number(), |election| election.office);
        let settings = Settings {
            run_id: "job".into(),
            join_timeout: JOIN_TIMEOUT,
            last_call: Duration::from_millis(LAST_CALL),
            run_stamp: format!("stamp{number}"),
        };
        let start = self.local(host);
        let mut ledger = None;
        let mut record = None;
        if let Some(Election { leader, state, record: found, sent, .. }) = election {
            let until = sent + TTL;
            ledger = Some(Ledger { leader, state, until, last: None, writing: None });
            record = found;
            self.plan(self.now, Happening::Renew { host, office: number });
            let over = self.agents[host].clock.real(until);
            self.plan(over, Happening::LeaseOver { host, office: number });
        }
        let before = record.as_ref().map_or(Duration::ZERO, Record::now);
        let coordinator = match record {
            Some(record) => Coordinator::resume(settings, record),
            None => Coordinator::new(settings),
        };
        self.agents[host].office = Some(Office {
            number,
            coordinator,
            before,
            start,
            known: BTreeSet::new(),
            members: BTreeSet::new(),
            live: BTreeSet::new(),
            running: None,
            since: start,
            ledger,
            events: VecDeque::new(),
            tick: None,
        });
        self.work(host);
    }

    fn office(&mut self, host: usize, number: u64) -> Option<&mut Office> {
        self.agents[host].office.as_mut().filter(|office| office.number == number)
    }

    /// Gives the coordinator an event, once it has done with those before.
    pub(super) fn feed(&mut self, host: usize, event: Event) {
        if let Some(office) = &mut self.agents[host].office {
            office.events.push_back(event);
            self.work(host);
        }
    }

    fn work(&mut self, host: usize) {
        loop {
            let local = self.local(host);
            let Some(office) = &mut self.agents[host].office else { return };
            if office.ledger.as_ref().is_some_and(|ledger| ledger.writing.is_some()) {
                return;
            }
            let Some(event) = office.events.pop_front() else { break };
            match &event {
                Event::Message(peer, ToCoordinator::Hello(_)) => _ = office.known.insert(*peer),
                Event::Message(peer, ToCoordinator::Leave { .. }) | Event::Lost(peer) => {
                    office.known.remove(peer);
                    office.live.remove(peer);
                    office.members.remove(peer);
                }
                Event::Message(..) | Event::Tick => {}
            }
            let now = office.now(local);
            let was_closed = office.is_closed();
            let actions = office.coordinator.handle(now, event);
            for action in &actions {
                match action {
                    Action::Send(_, ToAgent::RoundStarted(round)) => office.running = Some(round.number),
                    Action::Send(_, ToAgent::RoundBroken { round, .. })
                        if office.running.take_if(|running| running == round).is_some() =>
                    {
                        office.since = local;
                    }
                    Action::Send(_, ToAgent::Closed { reason, .. }) => {
                        let waited = Duration::from_millis(local - office.since) >= JOIN_TIMEOUT;
                        assert!(waited || !reason.contains("nodes came within"), "RV-9: {reason}");
                    }
                    _ => {}
                }
            }
            let record = office.coordinator.record(now);
            let attempt = self.number();
            match self.agents[host].office.as_mut().and_then(|office| office.ledger.as_mut()) {
                Some(ledger) if ledger.last.as_ref().is_none_or(|last| !last.is_like(&record)) => {
                    ledger.last = Some(record.clone());
                    ledger.writing = Some(Writing { attempt, record, actions, was_closed });
                    self.write_record(host);
                }
                _ => self.perform(host, actions, was_closed),
            }
        }
        let clock = self.agents[host].clock;
        let Some(office) = &mut self.agents[host].office else { return };
        let due = office.coordinator.deadline().map(|due| clock.real(office.local(due)));
        if due != office.tick {
            office.tick = due;
            let number = office.number;
            if let Some(due) = due {
                self.plan(due, Happening::Tick { host, office: number });
            }
        }
    }

    pub(super) fn tick(&mut self, host: usize, number: u64) {
        let local = self.local(host);
        let Some(office) = self.office(host, number) else { return };
        office.tick = None;
        if office.coordinator.deadline().is_some_and(|due| office.local(due) <= local) {
            office.events.push_back(Event::Tick);
        }
        self.work(host);
    }

    fn write_record(&mut self, host: usize) {
        let clock = self.agents[host].clock;
        let Some(office) = &self.agents[host].office else { return };
        let number = office.number;
        let Some((ledger, writing)) = office.ledger.as_ref().and_then(|it| Some((it, it.writing.as_ref()?)))
        else {
            return;
        };
        let (leader, state, attempt) = (ledger.leader, ledger.state, writing.attempt);
        let record = writing.record.clone();
        self.ask_etcd(host, Request::Write { host, office: number, attempt, leader, state, record });
        let again = clock.real(self.local(host) + ANSWER);
        self.plan(again, Happening::Rewrite { host, office: number, attempt });
    }

    pub(super) fn rewrite(&mut self, host: usize, number: u64, attempt: u64) {
        let Some(ledger) = self.office(host, number).and_then(|office| office.ledger.as_mut()) else {
            return;
        };
        if ledger.writing.as_ref().is_some_and(|writing| writing.attempt == attempt) {
            self.write_record(host);
        }
    }

    pub(super) fn written(&mut self, host: usize, number: u64, attempt: u64, state: Option<u64>) {
        let Some(ledger) = self.office(host, number).and_then(|office| office.ledger.as_mut()) else {
            return;
        };
        let Some(writing) = ledger.writing.take_if(|writing| writing.attempt == attempt) else { return };
        match state {
            Some(state) => {
                ledger.state = state;
                self.perform(host, writing.actions, writing.was_closed);
                self.work(host);
            }
            None => self.close_office(host, "another may have been elected"),
        }
    }

    /// Does what the coordinator wants, and checks it.
    fn perform(&mut self, host: usize, actions: Vec<Action>, was_closed: bool) {
        let local = self.local(host);
        let Some(office) = &mut self.agents[host].office else { return };
        let number = office.number;
        let record = office.coordinator.record(office.now(local));
        let mut started: BTreeMap<Peer, Round> = BTreeMap::new();
        for action in &actions {
            match action {
                Action::Send(peer, ToAgent::RoundStarted(round)) => {
                    started.insert(*peer, round.clone());
                }
                Action::Send(peer, ToAgent::RoundBroken { .. } | ToAgent::Closed { .. }) => {
                    office.live.remove(peer);
                }
                Action::Close(peer) => {
                    office.known.remove(peer);
                    office.live.remove(peer);
                    office.members.remove(peer);
                }
                _ => {}
            }
        }
        if !started.is_empty() {
            assert!(!was_closed, "RV-5");
            assert!(office.live.is_empty(), "RV-7: {:?} are still in the last round", office.live);
            let peers: BTreeSet<Peer> = started.keys().copied().collect();
            let dropped: Vec<_> = office.members.difference(&peers).collect();
            assert!(dropped.is_empty(), "RV-8: {dropped:?} were dropped");
            (office.live, office.members) = (peers.clone(), peers);
            let who = |peer: &Peer| {
                self.network.connections.get(peer).map(|connection| (connection.agent, connection.life))
            };
            let views: Vec<_> = started.iter().map(|(peer, round)| (who(peer), round)).collect();
            self.history.started(self.now, number, &self.job, &views);
        }
        for action in actions {
            match action {
                Action::Send(peer, message) => {
                    if let ToAgent::Closed { success, .. } = &message {
                        self.history.closed(&record, *success);
                    }
                    self.send(peer, End::Agent, Item::ToAgent(message));
                }
                Action::Close(peer) => self.hang_up(peer, End::Host),
                Action::ClearStore => {}
            }
        }
    }

    pub(super) fn renew(&mut self, host: usize, number: u64) {
        let clock = self.agents[host].clock;
        let local = self.local(host);
        let Some(ledger) = self.office(host, number).and_then(|office| office.ledger.as_ref()) else {
            return;
        };
        // One request after another.
        if ledger.writing.is_none() {
            self.ask_etcd(host, Request::Renew { host, office: number, sent: local });
        }
        self.plan(clock.real(local + TTL / 3), Happening::Renew { host, office: number });
    }

    pub(super) fn renewed(&mut self, host: usize, number: u64, is_there: bool, sent: u64) {
        let Some(ledger) = self.office(host, number).and_then(|office| office.ledger.as_mut()) else {
            return;
        };
        if !is_there {
            self.close_office(host, "its lease is over");
            return;
        }
        ledger.until = ledger.until.max(sent + TTL);
    }

    pub(super) fn lease_over(&mut self, host: usize, number: u64) {
        let (local, clock) = (self.local(host), self.agents[host].clock);
        let Some(ledger) = self.office(host, number).and_then(|office| office.ledger.as_ref()) else {
            return;
        };
        match ledger.until {
            until if until <= local => self.close_office(host, "its lease is over by its own clock"),
            until => self.plan(clock.real(until), Happening::LeaseOver { host, office: number }),
        }
    }

    /// A coordinator ends, and with it all its connections.
    pub(super) fn close_office(&mut self, host: usize, why: &str) {
        let Some(office) = self.agents[host].office.take() else { return };
        self.tell(|| format!("coordinator {} ends: {why}", office.number));
        let own = |(_, connection): &(&Peer, &super::network::Connection)| connection.office == office.number;
        let peers: Vec<Peer> = self.network.connections.iter().filter(own).map(|(peer, _)| *peer).collect();
        peers.into_iter().for_each(|peer| self.hang_up(peer, End::Host));
    }

    /// The host of a coordinator is done itself.
    pub(super) fn resign(&mut self, host: usize, number: u64) {
        if self.office(host, number).is_none() {
            return;
        }
        self.close_office(host, "its host leaves");
        if self.job.kind == super::Kind::Etcd {
            self.ask_etcd(host, Request::Revoke { office: number });
        }
    }

    pub(super) fn resign_if_deserted(&mut self, host: usize, number: u64) {
        let is_here = |connection: &super::network::Connection| {
            connection.office == number && connection.is_open(End::Host)
        };
        if self.agents[host].is_done() && !self.network.connections.values().any(is_here) {
            self.plan(self.now, Happening::Resign { host, office: number });
        }
    }
}

impl Office {
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}
