//! Model agents: what the launcher's agent and its dispatcher do, without ranks.

use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, Round, ToAgent, ToCoordinator};

use super::super::random::Random;
use super::etcd::{Answer, Request};
use super::network::{End, Item};
use super::office::{Election, Office};
use super::world::{Happening, World};
use super::{Clock, Kind};
use crate::machine::Peer;

/// How long a coordinator is looked for: at first, or wherever it may have moved, and at an endpoint that was lost.
const JOIN_TIMEOUT: u64 = 600_000;
/// Pause between two looks, and how long one may take.
const RETRY: u64 = 400;
const ANSWER: u64 = 5000;
/// Longest that ranks take to end.
const STOP: u64 = 31_000;
/// How long the host of a coordinator waits for the others when it is done itself.
const CLOSE: u64 = 30_000;

/// What an agent is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not started, or gone for good.
    Down,
    Joining,
    /// Told that there is no place for it.
    Waiting,
    Running,
    /// Its ranks have failed, and it was not told yet what becomes of the round.
    Failing {
        ended: bool,
    },
    Stopping,
    Finished,
    Done,
}

pub(super) struct Agent {
    pub(super) clock: Clock,
    node_rank: Option<u32>,
    /// Its process, counted.
    pub(super) life: u64,
    pub(super) state: State,
    /// The last round that it was in.
    pub(super) round: Option<Round>,
    /// The run stamp of the job that it was told of.
    job: Option<String>,
    /// What its ranks were last asked to do: a number.
    epoch: u64,
    /// Its connection, once it is open.
    pub(super) link: Option<Peer>,
    /// Its search for the coordinator, and how long that lasts by its clock.
    seek: u64,
    seek_until: u64,
    /// A failure that no coordinator has answered, and its round.
    unanswered: Option<(u64, ToCoordinator)>,
    pub(super) asleep: bool,
    /// When its machine fell asleep, and its clock with it.
    stands_since: Option<u64>,
    /// When it was told of its round, and whether it slept since.
    since: u64,
    pub(super) slept: bool,
    pub(super) deferred: Vec<Happening>,
    pub(super) office: Option<Office>,
}

impl Agent {
    pub(super) fn new(random: &mut Random, node_rank: Option<u32>) -> Self {
        Self {
            clock: Clock { offset: random.below(1_000_000), rate: 900 + random.below(201), late: 0 },
            node_rank,
            life: 0,
            state: State::Down,
            round: None,
            job: None,
            epoch: 0,
            link: None,
            seek: 0,
            seek_until: 0,
            unanswered: None,
            asleep: false,
            stands_since: None,
            since: 0,
            slept: false,
            deferred: Vec::new(),
            office: None,
        }
    }

    pub(super) fn is_office(&self, number: u64) -> bool {
        self.office.as_ref().is_some_and(|office| office.number() == number)
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether it wants to be in the job.
    pub(super) fn is_there(&self) -> bool {
        !matches!(self.state, State::Down | State::Done)
    }

    fn is_running(&self, round: u64) -> bool {
        matches!(self.state, State::Running | State::Finished | State::Failing { .. })
            && self.round.as_ref().is_some_and(|last| last.number == round)
    }
}

impl World {
    pub(super) fn start(&mut self, host: usize) {
        if self.agents[host].state != State::Down {
            return;
        }
        let life = self.number();
        let agent = &mut self.agents[host];
        (agent.life, agent.state) = (life, State::Joining);
        (agent.round, agent.job, agent.unanswered) = (None, None, None);
        self.tell(|| format!("agent {host} starts"));
        if self.job.kind == Kind::Endpoint && host == 0 {
            self.found(host, None);
        }
        self.look(host, JOIN_TIMEOUT);
    }

    /// Looks for the coordinator.
    fn look(&mut self, host: usize, patience: u64) {
        self.agents[host].seek_until = self.local(host) + patience;
        self.seek_in(host, 0);
    }

    fn seek_in(&mut self, host: usize, pause: u64) {
        let seek = self.number();
        self.agents[host].seek = seek;
        self.plan_in(pause, 1 + pause / 4, Happening::Seek { host, seek });
    }

    pub(super) fn seek(&mut self, host: usize, seek: u64) {
        if self.agents[host].seek != seek || !self.agents[host].is_there() {
            return;
        }
        if self.local(host) >= self.agents[host].seek_until {
            self.not_met(host);
            return;
        }
        // What is asked may be lost.
        let next = self.number();
        self.agents[host].seek = next;
        self.plan_in(ANSWER, ANSWER / 4, Happening::Seek { host, seek: next });
        match self.job.kind {
            Kind::Etcd => {
                let sent = self.local(host);
                self.ask_etcd(host, Request::Find { host, seek: next, sent });
            }
            Kind::Endpoint => {
                let office = self.agents[0].office.as_ref().map_or(0, Office::number);
                self.plan_in(1, 100, Happening::Connect { host, seek: next, to: 0, office });
            }
        }
    }

    pub(super) fn hear_from_etcd(&mut self, host: usize, answer: Answer) {
        match answer {
            Answer::Leader { seek, host: to, office } => {
                if self.agents[host].seek == seek {
                    self.plan_in(1, 100, Happening::Connect { host, seek, to, office });
                }
            }
            Answer::Elected { seek, office, leader, state, record, sent } => {
                if self.agents[host].seek == seek && self.agents[host].is_there() {
                    self.found(host, Some(Election { office, leader, state, record, sent }));
                    self.seek_in(host, 0);
                }
            }
            Answer::Renewed { office, is_there, sent } => self.renewed(host, office, is_there, sent),
            Answer::Written { office, attempt, state } => self.written(host, office, attempt, state),
        }
    }

    pub(super) fn connect(&mut self, host: usize, seek: u64, to: usize, office: u64) {
        if self.agents[host].seek != seek || !self.agents[host].is_there() {
            return;
        }
        let reaches = self.network.reaches(host, to) && self.network.reaches(to, host);
        if !reaches || self.agents[to].asleep {
            // Nothing is heard of it; the next look comes by itself.
            return;
        }
        if !self.agents[to].is_office(office) {
            match self.job.kind == Kind::Endpoint && self.agents[host].round.is_some() {
                true => self.not_met(host),
                false => self.seek_in(host, RETRY),
            }
            return;
        }
        let peer = self.open(host, to, office);
        self.agents[host].seek = 0;
        self.agents[host].link = Some(peer);
        self.tell(|| format!("agent {host} has met {office} at host {to}: connection {peer}"));
        let agent = &self.agents[host];
        let hello = Hello {
            run_id: "job".into(),
            node_rank: agent.node_rank,
            nnodes: self.job.nnodes,
            local_world_size: 1 + (host as u32 % 3),
            role: (if host.is_multiple_of(3) { "master" } else { "worker" }).into(),
            ranks_store: None,
            restarts: self.job.restarts,
            host: format!("host{}", host / 2),
            keep_alive: KeepAlive::default(),
            agent: agent.life,
            run_stamp: agent.job.clone(),
            place: agent.round.as_ref().map(|round| round.you.group_rank),
            addresses: Vec::new(),
            pid: agent.life as u32,
        };
        let joins = matches!(agent.state, State::Joining | State::Waiting);
        let unanswered = agent.unanswered.clone().map(|(_, message)| message);
        self.say(host, ToCoordinator::Hello(hello));
        unanswered.into_iter().for_each(|message| self.say(host, message));
        if joins {
            self.say(host, ToCoordinator::Join);
        }
    }

    fn say(&mut self, host: usize, message: ToCoordinator) {
        if let Some(peer) = self.agents[host].link {
            self.send(peer, End::Host, Item::ToHost(message));
        }
    }

    /// None was found: it stops its ranks and leaves.
    fn not_met(&mut self, host: usize) {
        self.tell(|| format!("agent {host} has found no coordinator"));
        self.leave_round(host);
        self.done(host);
        self.perhaps_again(host);
    }

    /// What started it may start it again.
    pub(super) fn perhaps_again(&mut self, host: usize) {
        if self.agents[host].office.is_none() && self.random.chance(70) {
            self.agents[host].state = State::Down;
            self.plan_in(0, 60_000, Happening::Start { host });
        }
    }

    /// Its connection is gone.
    pub(super) fn lost(&mut self, host: usize) {
        self.agents[host].link = None;
        if !self.agents[host].is_there() {
            return;
        }
        self.tell(|| format!("agent {host} has lost its coordinator"));
        let (fewest, most) = self.job.nnodes;
        let outlives = fewest < most || self.job.restarts.max_restarts > 0;
        match self.job.kind {
            Kind::Etcd => {
                // Whoever looks for the coordinator is it no longer.
                self.close_office(host, "its own agent looks for another");
                self.look(host, JOIN_TIMEOUT);
            }
            Kind::Endpoint if host != 0 && outlives => self.look(host, JOIN_TIMEOUT),
            Kind::Endpoint => {
                self.not_met(host);
                return;
            }
        }
        match self.agents[host].state {
            State::Running | State::Failing { ended: false } => self.stop(host),
            State::Finished | State::Failing { ended: true } | State::Waiting => {
                self.leave_round(host);
                self.agents[host].state = State::Joining;
            }
            _ => {}
        }
    }

    /// Its process ends well or not, unless it has to stay for the others.
    fn done(&mut self, host: usize) {
        self.agents[host].state = State::Done;
        self.agents[host].epoch = 0;
        if let Some(office) = &self.agents[host].office {
            let office = office.number();
            self.plan_in(CLOSE, 1, Happening::Resign { host, office });
        }
        if let Some(peer) = self.agents[host].link.take() {
            self.hang_up(peer, End::Agent);
        }
    }

    pub(super) fn hear(&mut self, host: usize, message: ToAgent) {
        self.tell(|| format!("agent {host} hears {message:?}"));
        let state = self.agents[host].state;
        match message {
            ToAgent::RoundStarted(round) => {
                assert!(matches!(state, State::Joining | State::Waiting), "RV-7: agent {host} is {state:?}");
                let epoch = self.number();
                let agent = &mut self.agents[host];
                let last = agent.round.as_ref();
                assert!(
                    last.is_none_or(|last| last.number < round.number)
                        && agent.job.as_ref().is_none_or(|job| *job == round.run_stamp),
                    "RV-10: agent {host} was in {last:?} of {:?} and is in {round:?}",
                    agent.job
                );
                agent.job = Some(round.run_stamp.clone());
                (agent.state, agent.epoch, agent.round) = (State::Running, epoch, Some(round));
                (agent.unanswered, agent.since, agent.slept) = (None, self.now, false);
                let fails = if self.agents.len() > 50 { 1 } else { 20 };
                let well = self.now >= self.job.faults_until || !self.random.chance(fails);
                let takes = if well { self.job.work } else { self.random.below(60_000) };
                self.plan_in(takes, 20_000, Happening::RanksEnd { host, epoch, well });
            }
            ToAgent::RoundBroken { round, reason, .. } => {
                assert!(!reason.is_empty(), "RV-4");
                if self.agents[host].is_running(round) {
                    match state {
                        State::Running | State::Failing { ended: false } => self.stop(host),
                        _ => {
                            self.leave_round(host);
                            self.join(host);
                        }
                    }
                }
            }
            ToAgent::Closed { .. } | ToAgent::Refused { .. } => {
                self.leave_round(host);
                self.done(host);
            }
            ToAgent::Waiting { run_stamp, .. } => {
                (self.agents[host].state, self.agents[host].job) = (State::Waiting, Some(run_stamp));
            }
            // Model agents have no ranks that could stand still.
            ToAgent::KeepAlive | ToAgent::Standstill { .. } => {}
        }
    }

    fn join(&mut self, host: usize) {
        self.agents[host].state = State::Joining;
        self.say(host, ToCoordinator::Join);
    }

    fn stop(&mut self, host: usize) {
        self.leave_round(host);
        let epoch = self.number();
        (self.agents[host].state, self.agents[host].epoch) = (State::Stopping, epoch);
        self.plan_in(0, STOP, Happening::Stopped { host, epoch });
    }

    /// It knows that its round is over.
    fn leave_round(&mut self, host: usize) {
        let agent = &self.agents[host];
        if let Some(round) = &agent.round
            && agent.is_running(round.number)
            && !agent.slept
        {
            self.history.left(self.now, agent.since, round);
        }
    }

    pub(super) fn stopped(&mut self, host: usize, epoch: u64) {
        let agent = &mut self.agents[host];
        if agent.epoch != epoch {
            return;
        }
        match agent.state {
            State::Stopping => self.join(host),
            State::Failing { .. } => agent.state = State::Failing { ended: true },
            _ => {}
        }
    }

    pub(super) fn ranks_end(&mut self, host: usize, epoch: u64, well: bool) {
        let agent = &mut self.agents[host];
        let (true, State::Running, Some(round)) = (agent.epoch == epoch, agent.state, agent.round.clone())
        else {
            return;
        };
        let who = (host, agent.life);
        let number = round.number;
        if well {
            agent.state = State::Finished;
            self.history.finished(&round, who);
            self.say(host, ToCoordinator::Finished { round: number });
            return;
        }
        agent.state = State::Failing { ended: false };
        let hopeless = self.random.chance(3).then(|| "it is final".into());
        let uptime = Duration::from_secs(5 + self.random.below(10));
        let failed = ToCoordinator::Failed { round: number, reason: "a fault".into(), uptime, hopeless };
        self.agents[host].unanswered = Some((number, failed.clone()));
        self.history.failed(&round, who);
        self.say(host, failed);
        self.plan_in(0, STOP, Happening::Stopped { host, epoch });
        // Ranks elsewhere fail without it.
        for other in 0..self.agents.len() {
            let agent = &self.agents[other];
            if agent.state == State::Running && agent.is_running(number) && self.random.chance(20) {
                let epoch = self.agents[other].epoch;
                self.plan_in(0, 2000, Happening::RanksEnd { host: other, epoch, well: false });
            }
        }
    }

    /// The user stops it.
    pub(super) fn told_to_stop(&mut self, host: usize) {
        if self.agents[host].is_there() {
            self.tell(|| format!("agent {host} is told to stop"));
            self.say(host, ToCoordinator::Leave { reason: "told to".into(), preempted: false });
            self.done(host);
        }
    }

    /// Its process is gone, and with it its coordinator.
    pub(super) fn die(&mut self, host: usize, silently: bool) {
        self.tell(|| format!("agent {host} dies"));
        let agent = &mut self.agents[host];
        (agent.state, agent.link, agent.office, agent.epoch) = (State::Down, None, None, 0);
        (agent.asleep, agent.stands_since) = (false, None);
        agent.deferred.clear();
        self.close_all(host, silently);
        self.perhaps_again(host);
    }

    /// Its process is stopped, or all of its machine.
    pub(super) fn suspend(&mut self, host: usize, lasts: u64, machine: bool) {
        let agent = &mut self.agents[host];
        if agent.state == State::Down || std::mem::replace(&mut agent.asleep, true) {
            return;
        }
        self.tell(|| format!("agent {host} is suspended for {lasts}, its machine: {machine}"));
        self.agents[host].slept = true;
        self.agents[host].stands_since = machine.then_some(self.now);
        self.listen();
        self.plan_in(lasts, 1, Happening::Wake { host });
    }

    /// What it has missed comes at once, and in no order but that of each connection.
    pub(super) fn wake(&mut self, host: usize) {
        if !std::mem::replace(&mut self.agents[host].asleep, false) {
            return;
        }
        self.tell(|| format!("agent {host} goes on"));
        let agent = &mut self.agents[host];
        if let Some(since) = agent.stands_since.take() {
            agent.clock.late += self.now - since;
        }
        self.listen();
        for happening in std::mem::take(&mut self.agents[host].deferred) {
            self.plan_in(0, 20, happening);
        }
    }
}
