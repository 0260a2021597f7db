use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ice_proto::rendezvous::{Hello, Member, Round, ToAgent, ToCoordinator};

use super::admission;
use super::restarts::{Failure, Restarts, Verdict};

/// A connection of an agent, numbered in order of arrival.
pub type Peer = u64;

/// What a job is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its identifier.
    pub run_id: String,
    /// How long the nodes may take to come.
    pub join_timeout: Duration,
    /// `<MMDDHHmm>_<random>`.
    pub run_stamp: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message came.
    Message(Peer, ToCoordinator),
    /// A connection ended.
    Lost(Peer),
    /// Time passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a message.
    Send(Peer, ToAgent),
    /// End a connection once what was sent is through.
    Close(Peer),
    /// Empty the store: a round begins.
    ClearStore,
}

enum Phase {
    /// Nodes come, since then; the round does not start before its time.
    Joining { since: Duration, not_before: Duration, joined: BTreeSet<Peer> },
    /// The round runs; these nodes have finished.
    Running { finished: BTreeSet<Peer> },
    /// The job is over.
    Closed { success: bool, reason: String, no_restart: Option<String> },
}

/// The machine. See the module for its invariants.
pub struct Coordinator {
    settings: Settings,
    nodes: BTreeMap<Peer, Hello>,
    phase: Phase,
    round: u64,
    restarts: Restarts,
}

impl Coordinator {
    /// A job that nobody has joined.
    pub fn new(settings: Settings) -> Self {
        let phase = joining(Duration::ZERO, Duration::ZERO);
        Self { settings, nodes: BTreeMap::new(), phase, round: 0, restarts: Restarts::default() }
    }

    /// When time alone changes something.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Joining { not_before, joined, .. } if self.is_full(joined) => Some(*not_before),
            Phase::Joining { since, .. } => Some(*since + self.settings.join_timeout),
            _ => None,
        }
    }

    /// Whether the job is over.
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed { .. })
    }

    /// Takes in an event at a time, measured from the start.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            Event::Message(peer, message) => self.message(now, peer, message),
            Event::Lost(peer) => self.lost(peer),
            Event::Tick => self.tick(now),
        }
    }

    fn message(&mut self, now: Duration, peer: Peer, message: ToCoordinator) -> Vec<Action> {
        if let ToCoordinator::Hello(hello) = message {
            return self.hello(peer, hello);
        }
        if !self.nodes.contains_key(&peer) {
            return refuse(peer, "an agent must say hello first".into());
        }
        match message {
            ToCoordinator::Hello(_) | ToCoordinator::KeepAlive => Vec::new(),
            ToCoordinator::Join => self.join(now, peer),
            ToCoordinator::Failed { round, reason, uptime, hopeless } => {
                self.failed(now, peer, round, Failure { reason, uptime, hopeless })
            }
            ToCoordinator::Finished { round } => self.finished(peer, round),
            ToCoordinator::Leave { reason } => {
                let who = self.describe(peer);
                self.nodes.remove(&peer);
                let mut actions = vec![Action::Close(peer)];
                actions.extend(self.close(false, format!("{who} left: {reason}")));
                actions
            }
        }
    }

    fn hello(&mut self, peer: Peer, hello: Hello) -> Vec<Action> {
        if let Some(closed) = self.last_word() {
            return vec![Action::Send(peer, closed), Action::Close(peer)];
        }
        if self.nodes.contains_key(&peer) {
            return refuse(peer, "an agent says hello once".into());
        }
        match admission::check(&self.settings.run_id, &self.nodes, &hello) {
            Ok(()) => {
                self.nodes.insert(peer, hello);
                Vec::new()
            }
            Err(reason) => refuse(peer, reason),
        }
    }

    fn join(&mut self, now: Duration, peer: Peer) -> Vec<Action> {
        let Phase::Joining { joined, .. } = &mut self.phase else { return Vec::new() };
        joined.insert(peer);
        self.start_if_due(now)
    }

    /// Nodes that the job wants.
    fn wanted(&self) -> u32 {
        self.nodes.values().next().map_or(1, |node| node.nnodes.1)
    }

    fn is_full(&self, joined: &BTreeSet<Peer>) -> bool {
        joined.len() >= self.wanted() as usize
    }

    fn start_if_due(&mut self, now: Duration) -> Vec<Action> {
        match &self.phase {
            Phase::Joining { not_before, joined, .. } if now >= *not_before && self.is_full(joined) => {
                self.start_round()
            }
            _ => Vec::new(),
        }
    }

    fn start_round(&mut self) -> Vec<Action> {
        let places = admission::places(&self.nodes);
        let mut first_rank = 0;
        let mut members = Vec::new();
        for (group_rank, node) in (0..).zip(places.iter().filter_map(|peer| self.nodes.get(peer))) {
            let local_world_size = node.local_world_size;
            members.push(Member { group_rank, first_rank, local_world_size, host: node.host.clone() });
            first_rank += local_world_size;
        }
        let mut actions = vec![Action::ClearStore];
        for (you, peer) in (0..).zip(places) {
            let round = Round {
                number: self.round,
                restart_count: self.restarts.count(),
                members: members.clone(),
                you,
                run_stamp: self.settings.run_stamp.clone(),
            };
            actions.push(Action::Send(peer, ToAgent::RoundStarted(round)));
        }
        self.phase = Phase::Running { finished: BTreeSet::new() };
        actions
    }

    fn failed(&mut self, now: Duration, peer: Peer, round: u64, failure: Failure) -> Vec<Action> {
        if !matches!(self.phase, Phase::Running { .. }) || round != self.round {
            return Vec::new();
        }
        let Some(policy) = self.nodes.get(&peer).map(|node| node.restarts) else { return Vec::new() };
        let verdict = self.restarts.decide(&policy, now, &failure);
        let reason = format!("{}: {}", self.describe(peer), failure.reason);
        match verdict {
            Verdict::GiveUp { why } => self.end(false, reason, why),
            Verdict::Restart { after, note } => {
                self.round += 1;
                self.phase = joining(now, now + after);
                self.broadcast(&ToAgent::RoundBroken { round, reason: format!("{reason}; {note}") })
            }
        }
    }

    fn finished(&mut self, peer: Peer, round: u64) -> Vec<Action> {
        if round != self.round {
            return Vec::new();
        }
        let Phase::Running { finished } = &mut self.phase else { return Vec::new() };
        finished.insert(peer);
        if finished.len() < self.nodes.len() {
            return Vec::new();
        }
        self.close(true, "all ranks finished".into())
    }

    fn lost(&mut self, peer: Peer) -> Vec<Action> {
        if !self.nodes.contains_key(&peer) {
            return Vec::new();
        }
        let who = self.describe(peer);
        self.nodes.remove(&peer);
        match &mut self.phase {
            // A node that goes while others are still awaited may come back.
            Phase::Joining { joined, .. } if self.round == 0 => {
                joined.remove(&peer);
                Vec::new()
            }
            Phase::Closed { .. } => Vec::new(),
            _ => self.close(false, format!("lost {who}: its agent is gone")),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let started = self.start_if_due(now);
        let Phase::Joining { joined, .. } = &self.phase else { return started };
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        let wanted = if self.nodes.is_empty() { 0 } else { self.wanted() };
        let there: Vec<_> = self
            .nodes
            .iter()
            .filter(|(peer, _)| joined.contains(peer))
            .map(|(_, n)| n.host.clone())
            .collect();
        let missing: Vec<_> = (0..wanted)
            .filter(|rank| self.nodes.values().all(|node| node.node_rank != Some(*rank)))
            .map(|rank| rank.to_string())
            .take(32)
            .collect();
        let reason = format!(
            "{} of {wanted} nodes came within {:?} (here: {}; not seen: --node-rank {})",
            there.len(),
            self.settings.join_timeout,
            there.join(", "),
            missing.join(", ")
        );
        self.close(false, reason)
    }

    fn close(&mut self, success: bool, reason: String) -> Vec<Action> {
        self.end(success, reason, None)
    }

    fn end(&mut self, success: bool, reason: String, no_restart: Option<String>) -> Vec<Action> {
        if self.is_closed() {
            return Vec::new();
        }
        self.phase = Phase::Closed { success, reason, no_restart };
        self.last_word().map(|closed| self.broadcast(&closed)).unwrap_or_default()
    }

    /// What agents are told once the job is over.
    fn last_word(&self) -> Option<ToAgent> {
        let Phase::Closed { success, reason, no_restart } = &self.phase else { return None };
        let (reason, no_restart) = (reason.clone(), no_restart.clone());
        Some(ToAgent::Closed { success: *success, reason, no_restart })
    }

    fn broadcast(&self, message: &ToAgent) -> Vec<Action> {
        self.nodes.keys().map(|peer| Action::Send(*peer, message.clone())).collect()
    }

    fn describe(&self, peer: Peer) -> String {
        let Some(node) = self.nodes.get(&peer) else { return "an unknown node".into() };
        let place = || admission::places(&self.nodes).iter().position(|other| *other == peer);
        let rank = match node.node_rank {
            Some(rank) => rank.to_string(),
            None => place().map_or_else(|| "?".into(), |place| place.to_string()),
        };
        format!("node {rank} (host {}, pid {})", node.host, node.pid)
    }
}

fn joining(now: Duration, not_before: Duration) -> Phase {
    Phase::Joining { since: now, not_before, joined: BTreeSet::new() }
}

fn refuse(peer: Peer, reason: String) -> Vec<Action> {
    vec![Action::Send(peer, ToAgent::Refused { reason }), Action::Close(peer)]
}
