//! Model agents: the behaviour of the launcher's agent and its dispatcher, without ranks.

use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, Round, ToAgent, ToCoordinator};

use super::cluster::{Cluster, SimEvent};
use super::etcd::{Answer, Request};
use super::network::{End, Item};
use super::sim_coordinator::{Election, SimCoordinator};
use super::{Clock, Discovery};
use crate::Peer;
use ice_testing::Random;

/// Timeout of the search for a coordinator: the first one, one that may have moved, or one at an
/// endpoint that was lost. All times are in milliseconds.
const JOIN_TIMEOUT: u64 = 600_000;
/// Pause between two attempts, and the timeout of each.
const RETRY: u64 = 400;
const ANSWER: u64 = 5000;
/// Maximum time that ranks take to stop.
const STOP: u64 = 31_000;
/// Time that the coordinator's host waits for the other agents once it is done itself.
const CLOSE: u64 = 30_000;

/// State of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not started, or dead.
    Down,
    Joining,
    /// Told to wait for a free rank.
    Waiting,
    Running,
    /// Its ranks have failed, and the verdict has not arrived.
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
    /// Number of its process.
    pub(super) incarnation: u64,
    pub(super) state: State,
    /// The last round that it was in.
    pub(super) round: Option<Round>,
    /// Run stamp of its job, once known.
    job: Option<String>,
    /// Number of the last command to its ranks; events of earlier commands are ignored.
    epoch: u64,
    /// Its connection, once open.
    pub(super) link: Option<Peer>,
    /// Number of its search for the coordinator, and the end of the search by its clock.
    seek: u64,
    seek_until: u64,
    /// A failure without a verdict, and its round.
    unacknowledged: Option<(u64, ToCoordinator)>,
    pub(super) asleep: bool,
    /// Time when its machine was suspended, and its clock with it.
    stands_since: Option<u64>,
    /// Time when it received its round, and whether it was suspended since.
    since: u64,
    pub(super) slept: bool,
    pub(super) deferred: Vec<SimEvent>,
    pub(super) coordinator: Option<SimCoordinator>,
}

impl Agent {
    pub(super) fn new(random: &mut Random, node_rank: Option<u32>) -> Self {
        Self {
            clock: Clock { offset: random.below(1_000_000), rate: 900 + random.below(201), late: 0 },
            node_rank,
            incarnation: 0,
            state: State::Down,
            round: None,
            job: None,
            epoch: 0,
            link: None,
            seek: 0,
            seek_until: 0,
            unacknowledged: None,
            asleep: false,
            stands_since: None,
            since: 0,
            slept: false,
            deferred: Vec::new(),
            coordinator: None,
        }
    }

    pub(super) fn coordinates(&self, term: u64) -> bool {
        self.coordinator.as_ref().is_some_and(|coordinator| coordinator.term() == term)
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Returns whether it wants to be in the job.
    pub(super) fn is_active(&self) -> bool {
        !matches!(self.state, State::Down | State::Done)
    }

    fn is_running(&self, round: u64) -> bool {
        matches!(self.state, State::Running | State::Finished | State::Failing { .. })
            && self.round.as_ref().is_some_and(|last| last.number == round)
    }
}

impl Cluster {
    pub(super) fn start(&mut self, host: usize) {
        if self.agents[host].state != State::Down {
            return;
        }
        let incarnation = self.next_number();
        let agent = &mut self.agents[host];
        (agent.incarnation, agent.state) = (incarnation, State::Joining);
        (agent.round, agent.job, agent.unacknowledged) = (None, None, None);
        self.trace(|| format!("agent {host} starts"));
        if self.job.kind == Discovery::Endpoint && host == 0 {
            self.elect(host, None);
        }
        self.start_search(host, JOIN_TIMEOUT);
    }

    /// Starts a search for the coordinator.
    fn start_search(&mut self, host: usize, patience: u64) {
        self.agents[host].seek_until = self.local(host) + patience;
        self.seek_in(host, 0);
    }

    fn seek_in(&mut self, host: usize, pause: u64) {
        let seek = self.next_number();
        self.agents[host].seek = seek;
        self.schedule_in(pause, 1 + pause / 4, SimEvent::Seek { host, seek });
    }

    pub(super) fn seek(&mut self, host: usize, seek: u64) {
        if self.agents[host].seek != seek || !self.agents[host].is_active() {
            return;
        }
        if self.local(host) >= self.agents[host].seek_until {
            self.search_failed(host);
            return;
        }
        // The request may be lost, so another attempt is scheduled.
        let next = self.next_number();
        self.agents[host].seek = next;
        self.schedule_in(ANSWER, ANSWER / 4, SimEvent::Seek { host, seek: next });
        match self.job.kind {
            Discovery::Etcd => {
                let sent = self.local(host);
                self.ask_etcd(host, Request::Find { host, seek: next, sent });
            }
            Discovery::Endpoint => {
                let term = self.agents[0].coordinator.as_ref().map_or(0, SimCoordinator::term);
                self.schedule_in(1, 100, SimEvent::Connect { host, seek: next, to: 0, term });
            }
        }
    }

    pub(super) fn hear_from_etcd(&mut self, host: usize, answer: Answer) {
        match answer {
            Answer::Leader { seek, host: to, term } => {
                if self.agents[host].seek == seek {
                    self.schedule_in(1, 100, SimEvent::Connect { host, seek, to, term });
                }
            }
            Answer::Elected { seek, term, leader, state, record, sent } => {
                if self.agents[host].seek == seek && self.agents[host].is_active() {
                    self.elect(host, Some(Election { term, leader, state, record, sent }));
                    self.seek_in(host, 0);
                }
            }
            Answer::Renewed { term, is_active, sent } => self.renewed(host, term, is_active, sent),
            Answer::Written { term, attempt, state } => self.written(host, term, attempt, state),
        }
    }

    pub(super) fn connect(&mut self, host: usize, seek: u64, to: usize, term: u64) {
        if self.agents[host].seek != seek || !self.agents[host].is_active() {
            return;
        }
        let reaches = self.network.reaches(host, to) && self.network.reaches(to, host);
        if !reaches || self.agents[to].asleep {
            // The connection attempt is lost; the next attempt is scheduled already.
            return;
        }
        if !self.agents[to].coordinates(term) {
            match self.job.kind == Discovery::Endpoint && self.agents[host].round.is_some() {
                true => self.search_failed(host),
                false => self.seek_in(host, RETRY),
            }
            return;
        }
        let peer = self.open(host, to, term);
        self.agents[host].seek = 0;
        self.agents[host].link = Some(peer);
        self.trace(|| format!("agent {host} has met {term} at host {to}: connection {peer}"));
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
            agent_id: agent.incarnation,
            run_stamp: agent.job.clone(),
            last_node_rank: agent.round.as_ref().map(|round| round.assignment.group_rank),
            addresses: Vec::new(),
            pid: agent.incarnation as u32,
        };
        let joins = matches!(agent.state, State::Joining | State::Waiting);
        let unacknowledged = agent.unacknowledged.clone().map(|(_, message)| message);
        self.send_message(host, ToCoordinator::Hello(hello));
        unacknowledged.into_iter().for_each(|message| self.send_message(host, message));
        if joins {
            self.send_message(host, ToCoordinator::Join);
        }
    }

    fn send_message(&mut self, host: usize, message: ToCoordinator) {
        if let Some(peer) = self.agents[host].link {
            self.send(peer, End::Server, Item::ToServer(message));
        }
    }

    /// The search was in vain: the agent stops its ranks and leaves.
    fn search_failed(&mut self, host: usize) {
        self.trace(|| format!("agent {host} has found no coordinator"));
        self.leave_round(host);
        self.done(host);
        self.maybe_restart(host);
    }

    /// A supervisor may start the agent again.
    pub(super) fn maybe_restart(&mut self, host: usize) {
        if self.agents[host].coordinator.is_none() && self.random.chance(70) {
            self.agents[host].state = State::Down;
            self.schedule_in(0, 60_000, SimEvent::Start { host });
        }
    }

    /// The agent's connection is lost.
    pub(super) fn connection_lost(&mut self, host: usize) {
        self.agents[host].link = None;
        if !self.agents[host].is_active() {
            return;
        }
        self.trace(|| format!("agent {host} has lost its coordinator"));
        let (min_nodes, max_nodes) = self.job.nnodes;
        let outlives = min_nodes < max_nodes || self.job.restarts.max_restarts > 0;
        match self.job.kind {
            Discovery::Etcd => {
                // An agent that searches for the coordinator hosts it no longer.
                self.stop_coordinator(host, "its own agent looks for another");
                self.start_search(host, JOIN_TIMEOUT);
            }
            Discovery::Endpoint if host != 0 && outlives => self.start_search(host, JOIN_TIMEOUT),
            Discovery::Endpoint => {
                self.search_failed(host);
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

    /// The agent's work is over. Its process ends, unless it hosts the coordinator for the others.
    fn done(&mut self, host: usize) {
        self.agents[host].state = State::Done;
        self.agents[host].epoch = 0;
        if let Some(coordinator) = &self.agents[host].coordinator {
            let term = coordinator.term();
            self.schedule_in(CLOSE, 1, SimEvent::Resign { host, term });
        }
        if let Some(peer) = self.agents[host].link.take() {
            self.close_end(peer, End::Agent);
        }
    }

    pub(super) fn receive(&mut self, host: usize, message: ToAgent) {
        self.trace(|| format!("agent {host} hears {message:?}"));
        let state = self.agents[host].state;
        match message {
            ToAgent::RoundStarted(round) => {
                assert!(matches!(state, State::Joining | State::Waiting), "RV-7: agent {host} is {state:?}");
                let epoch = self.next_number();
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
                (agent.unacknowledged, agent.since, agent.slept) = (None, self.now, false);
                let fails = if self.agents.len() > 50 { 1 } else { 20 };
                let succeeds = self.now >= self.job.faults_until || !self.random.chance(fails);
                let takes = if succeeds { self.job.work } else { self.random.below(60_000) };
                self.schedule_in(takes, 20_000, SimEvent::RanksEnd { host, epoch, succeeds });
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
        self.send_message(host, ToCoordinator::Join);
    }

    fn stop(&mut self, host: usize) {
        self.leave_round(host);
        let epoch = self.next_number();
        (self.agents[host].state, self.agents[host].epoch) = (State::Stopping, epoch);
        self.schedule_in(0, STOP, SimEvent::Stopped { host, epoch });
    }

    /// Notes that the agent knows that its round is over.
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

    pub(super) fn ranks_end(&mut self, host: usize, epoch: u64, succeeds: bool) {
        let agent = &mut self.agents[host];
        let (true, State::Running, Some(round)) = (agent.epoch == epoch, agent.state, agent.round.clone())
        else {
            return;
        };
        let who = (host, agent.incarnation);
        let number = round.number;
        if succeeds {
            agent.state = State::Finished;
            self.history.finished(&round, who);
            self.send_message(host, ToCoordinator::Finished { round: number });
            return;
        }
        agent.state = State::Failing { ended: false };
        let fatal_reason = self.random.chance(3).then(|| "it is final".into());
        let uptime = Duration::from_secs(5 + self.random.below(10));
        let failed = ToCoordinator::Failed { round: number, reason: "a fault".into(), uptime, fatal_reason };
        self.agents[host].unacknowledged = Some((number, failed.clone()));
        self.history.failed(&round, who);
        self.send_message(host, failed);
        self.schedule_in(0, STOP, SimEvent::Stopped { host, epoch });
        // Ranks of other nodes fail as a consequence.
        for other in 0..self.agents.len() {
            let agent = &self.agents[other];
            if agent.state == State::Running && agent.is_running(number) && self.random.chance(20) {
                let epoch = self.agents[other].epoch;
                self.schedule_in(0, 2000, SimEvent::RanksEnd { host: other, epoch, succeeds: false });
            }
        }
    }

    /// The user stops the agent.
    pub(super) fn stop_requested(&mut self, host: usize) {
        if self.agents[host].is_active() {
            self.trace(|| format!("agent {host} is told to stop"));
            self.send_message(host, ToCoordinator::Leave { reason: "told to".into(), preempted: false });
            self.done(host);
        }
    }

    /// Kills the agent's process, and with it its coordinator.
    pub(super) fn die(&mut self, host: usize, silently: bool) {
        self.trace(|| format!("agent {host} dies"));
        let agent = &mut self.agents[host];
        (agent.state, agent.link, agent.coordinator, agent.epoch) = (State::Down, None, None, 0);
        (agent.asleep, agent.stands_since) = (false, None);
        agent.deferred.clear();
        self.close_all(host, silently);
        self.maybe_restart(host);
    }

    /// Suspends the agent's process, or its whole machine.
    pub(super) fn suspend(&mut self, host: usize, lasts: u64, machine: bool) {
        let agent = &mut self.agents[host];
        if agent.state == State::Down || std::mem::replace(&mut agent.asleep, true) {
            return;
        }
        self.trace(|| format!("agent {host} is suspended for {lasts}, its machine: {machine}"));
        self.agents[host].slept = true;
        self.agents[host].stands_since = machine.then_some(self.now);
        self.listen();
        self.schedule_in(lasts, 1, SimEvent::Wake { host });
    }

    /// Resumes the agent. Deferred events arrive at once, in any order but that of each connection.
    pub(super) fn wake(&mut self, host: usize) {
        if !std::mem::replace(&mut self.agents[host].asleep, false) {
            return;
        }
        self.trace(|| format!("agent {host} goes on"));
        let agent = &mut self.agents[host];
        if let Some(since) = agent.stands_since.take() {
            agent.clock.late += self.now - since;
        }
        self.listen();
        for event in std::mem::take(&mut self.agents[host].deferred) {
            self.schedule_in(0, 20, event);
        }
    }
}
