use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ice_proto::rendezvous::{Hello, Member, Round, ToAgent, ToCoordinator};

use super::restarts::{Failure, Restarts, Verdict};
use super::{Record, admission, places};

/// A connection of an agent, numbered in order of arrival.
pub type Peer = u64;

/// What a job is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its identifier.
    pub run_id: String,
    /// How long the nodes may take to come.
    pub join_timeout: Duration,
    /// How long more nodes are waited for once there are enough.
    pub last_call: Duration,
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

/// An agent that said hello.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) hello: Hello,
    /// Its rank in the last round that it was in.
    pub(super) place: Option<u32>,
    /// Whether it has no rank running and wants to be in the next round.
    pub(super) waits: bool,
}

enum Phase {
    /// Nodes come.
    Joining(Joining),
    /// The round runs.
    Running { members: BTreeSet<Peer>, finished: BTreeSet<Peer> },
    /// The job is over.
    Closed { success: bool, reason: String, no_restart: Option<String> },
}

#[derive(Default)]
struct Joining {
    since: Duration,
    /// The round does not start before.
    not_before: Duration,
    joined: BTreeSet<Peer>,
    /// Since when there have been enough nodes.
    enough_since: Option<Duration>,
}

#[derive(PartialEq, Eq)]
enum Gone {
    Lost,
    Left(String),
}

/// The machine. See the module for its invariants.
pub struct Coordinator {
    settings: Settings,
    nodes: BTreeMap<Peer, Node>,
    phase: Phase,
    round: u64,
    restarts: Restarts,
}

impl Coordinator {
    /// A job that nobody has joined.
    pub fn new(settings: Settings) -> Self {
        let phase = Phase::Joining(Joining::default());
        Self { settings, nodes: BTreeMap::new(), phase, round: 0, restarts: Restarts::default() }
    }

    /// A job that another coordinator had, as it was when that wrote its record. The clock goes on from there.
    pub fn resume(settings: Settings, record: Record) -> Self {
        let phase = match record.closed {
            Some((success, reason, no_restart)) => Phase::Closed { success, reason, no_restart },
            None if record.finished => Phase::Closed {
                success: false,
                reason: "the coordinator was lost while nodes finished: what they did cannot be done again"
                    .into(),
                no_restart: None,
            },
            None => Phase::Joining(Joining { since: record.now, ..Joining::default() }),
        };
        let settings = Settings { run_stamp: record.run_stamp, ..settings };
        Self { settings, nodes: BTreeMap::new(), phase, round: record.next_round, restarts: record.restarts }
    }

    /// What another coordinator needs in order to go on.
    pub fn record(&self, now: Duration) -> Record {
        let running = matches!(self.phase, Phase::Running { .. });
        Record {
            now,
            next_round: self.round + u64::from(running),
            restarts: self.restarts.clone(),
            run_stamp: self.settings.run_stamp.clone(),
            finished: matches!(&self.phase, Phase::Running { finished, .. } if !finished.is_empty()),
            closed: match &self.phase {
                Phase::Closed { success, reason, no_restart } => {
                    Some((*success, reason.clone(), no_restart.clone()))
                }
                _ => None,
            },
        }
    }

    /// When time alone changes something.
    pub fn deadline(&self) -> Option<Duration> {
        let Phase::Joining(joining) = &self.phase else { return None };
        Some(self.due(joining).unwrap_or(joining.since + self.settings.join_timeout))
    }

    /// When the round may start with those that have joined; `None` while somebody must come first.
    fn due(&self, joining: &Joining) -> Option<Duration> {
        let enough_since = joining.enough_since?;
        let members = self.members(joining)?.len();
        // Members of the last round are in this one: those that still stop their ranks are waited for.
        let is_back = |(peer, node): (&Peer, &Node)| node.place.is_none() || joining.joined.contains(peer);
        if !self.nodes.iter().all(is_back) {
            return None;
        }
        let nobody_else = self.round > 0 && members == self.nodes.len();
        let (_, most) = self.nnodes();
        match members == most as usize || nobody_else {
            true => Some(joining.not_before),
            false => Some((enough_since + self.settings.last_call).max(joining.not_before)),
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
            Event::Lost(peer) => self.gone(now, peer, Gone::Lost),
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
                let mut actions = vec![Action::Close(peer)];
                actions.extend(self.gone(now, peer, Gone::Left(reason)));
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
        let begun = self.round > 0 || matches!(self.phase, Phase::Running { .. });
        match admission::check(&self.settings.run_id, &self.nodes, &hello, begun) {
            Ok(()) => {
                // It had one under another coordinator, or before it was cut off.
                let place = hello.place;
                self.nodes.insert(peer, Node { hello, place, waits: false });
                Vec::new()
            }
            Err(reason) => refuse(peer, reason),
        }
    }

    /// Fewest and most nodes of a round; all agents say the same.
    fn nnodes(&self) -> (u32, u32) {
        self.nodes.values().next().map_or((1, 1), |node| node.hello.nnodes)
    }

    fn join(&mut self, now: Duration, peer: Peer) -> Vec<Action> {
        let (_, most) = self.nnodes();
        let is_member = self.is_member(peer);
        if let Some(node) = self.nodes.get_mut(&peer) {
            node.waits = !is_member;
        }
        match &mut self.phase {
            Phase::Joining(joining) => {
                joining.joined.insert(peer);
                self.start_if_due(now)
            }
            Phase::Running { .. } if is_member => Vec::new(),
            Phase::Running { members, finished } => {
                // Once a node has finished, the others soon will.
                if members.len() < most as usize && finished.is_empty() {
                    let reason = format!("{} has come", self.describe(peer));
                    return self.next_round(now, Duration::ZERO, &reason);
                }
                let nodes = members.len();
                let reason =
                    format!("the job has its {nodes} nodes; this one takes the place of one that goes");
                vec![Action::Send(peer, ToAgent::Waiting { reason })]
            }
            Phase::Closed { .. } => Vec::new(),
        }
    }

    fn start_if_due(&mut self, now: Duration) -> Vec<Action> {
        let Phase::Joining(joining) = &self.phase else { return Vec::new() };
        let members = self.members(joining);
        let Phase::Joining(joining) = &mut self.phase else { return Vec::new() };
        joining.enough_since = members.is_some().then(|| joining.enough_since.unwrap_or(now));
        let Phase::Joining(joining) = &self.phase else { return Vec::new() };
        let is_due = self.due(joining).is_some_and(|due| now >= due);
        members.filter(|_| is_due).map(|members| self.start_round(&members)).unwrap_or_default()
    }

    /// Who would be in the round; `None` while they are too few.
    fn members(&self, joining: &Joining) -> Option<Vec<Peer>> {
        let (fewest, most) = self.nnodes();
        // Said first, since thousands may come one by one.
        if joining.joined.len() < fewest as usize {
            return None;
        }
        let members = places::choose(&self.nodes, &joining.joined, most as usize);
        (members.len() >= fewest as usize).then_some(members)
    }

    fn start_round(&mut self, members: &[Peer]) -> Vec<Action> {
        let places = places::arrange(&self.nodes, members);
        let mut first_rank = 0;
        let mut views = Vec::new();
        for (group_rank, node) in (0..).zip(places.iter().filter_map(|peer| self.nodes.get(peer))) {
            let local_world_size = node.hello.local_world_size;
            let host = node.hello.host.clone();
            views.push(Member { group_rank, first_rank, local_world_size, host });
            first_rank += local_world_size;
        }
        let mut actions = vec![Action::ClearStore];
        for (you, peer) in (0..).zip(&places) {
            let round = Round {
                number: self.round,
                restart_count: self.restarts.count(),
                members: views.clone(),
                you,
                run_stamp: self.settings.run_stamp.clone(),
            };
            actions.push(Action::Send(*peer, ToAgent::RoundStarted(round)));
        }
        for (peer, node) in &mut self.nodes {
            node.place = (0..).zip(&places).find(|(_, member)| *member == peer).map(|(place, _)| place);
            node.waits &= node.place.is_none();
            if node.waits {
                let reason = "there are enough nodes without this one; it takes the place of one that goes";
                actions.push(Action::Send(*peer, ToAgent::Waiting { reason: reason.into() }));
            }
        }
        self.phase = Phase::Running { members: places.into_iter().collect(), finished: BTreeSet::new() };
        actions
    }

    fn failed(&mut self, now: Duration, peer: Peer, round: u64, failure: Failure) -> Vec<Action> {
        if !self.is_member(peer) || round != self.round {
            return Vec::new();
        }
        let Some(policy) = self.nodes.get(&peer).map(|node| node.hello.restarts) else { return Vec::new() };
        let verdict = self.restarts.decide(&policy, now, &failure);
        let reason = format!("{}: {}", self.describe(peer), failure.reason);
        match verdict {
            Verdict::GiveUp { why } => self.end(false, reason, why),
            Verdict::Restart { after, note } => self.next_round(now, after, &format!("{reason}; {note}")),
        }
    }

    fn is_member(&self, peer: Peer) -> bool {
        matches!(&self.phase, Phase::Running { members, .. } if members.contains(&peer))
    }

    /// Ends the round for its members. Those that wait for a place are in already; one that has only said hello may have ranks that end.
    fn next_round(&mut self, now: Duration, pause: Duration, reason: &str) -> Vec<Action> {
        let Phase::Running { members, .. } = &self.phase else { return Vec::new() };
        let members = members.clone();
        let message = ToAgent::RoundBroken { round: self.round, reason: reason.to_owned() };
        self.round += 1;
        let joined = self.nodes.iter().filter(|(_, node)| node.waits).map(|(peer, _)| *peer).collect();
        self.phase =
            Phase::Joining(Joining { since: now, not_before: now + pause, joined, enough_since: None });
        let there = members.into_iter().filter(|peer| self.nodes.contains_key(peer));
        let mut actions: Vec<_> = there.map(|peer| Action::Send(peer, message.clone())).collect();
        actions.extend(self.start_if_due(now));
        actions
    }

    fn finished(&mut self, peer: Peer, round: u64) -> Vec<Action> {
        if round != self.round || !self.is_member(peer) {
            return Vec::new();
        }
        let Phase::Running { members, finished } = &mut self.phase else { return Vec::new() };
        finished.insert(peer);
        let all = members.is_subset(finished);
        if all { self.end(true, "all ranks finished".into(), None) } else { Vec::new() }
    }

    /// A node is lost or leaves. An elastic job goes on with the others, or waits for more. One of a fixed size waits for a lost node
    /// to come back where restarts are allowed.
    fn gone(&mut self, now: Duration, peer: Peer, how: Gone) -> Vec<Action> {
        let who = self.describe(peer);
        let Some(node) = self.nodes.remove(&peer) else { return Vec::new() };
        let (fewest, most) = node.hello.nnodes;
        let goes_on = fewest < most || (how == Gone::Lost && node.hello.restarts.max_restarts > 0);
        let reason = match how {
            Gone::Lost => format!("lost {who}: its agent is gone"),
            Gone::Left(reason) => format!("{who} left: {reason}"),
        };
        match &mut self.phase {
            Phase::Closed { .. } => Vec::new(),
            // One that had finished is not missed, nor one that only waited.
            Phase::Running { members, finished } if !members.contains(&peer) || finished.contains(&peer) => {
                Vec::new()
            }
            Phase::Joining(joining) if self.round == 0 || node.place.is_none() || goes_on => {
                joining.joined.remove(&peer);
                self.start_if_due(now)
            }
            // What the others have finished cannot be done again.
            Phase::Running { finished, .. } if goes_on && finished.is_empty() => {
                let left = self.nodes.len();
                let note = match left >= fewest as usize {
                    true => format!("{reason}; going on with {left} nodes"),
                    false => format!("{reason}; waiting for another node, since {fewest} are needed"),
                };
                self.next_round(now, Duration::ZERO, &note)
            }
            _ => self.end(false, reason, None),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let started = self.start_if_due(now);
        let Phase::Joining(joining) = &self.phase else { return started };
        if self.due(joining).is_some() || now < joining.since + self.settings.join_timeout {
            return started;
        }
        let (fewest, most) = if self.nodes.is_empty() { (0, 0) } else { self.nnodes() };
        let wanted = if fewest == most { most.to_string() } else { format!("at least {fewest}") };
        let joined = |(peer, _): &(&Peer, &Node)| joining.joined.contains(peer);
        let there: Vec<_> =
            self.nodes.iter().filter(joined).map(|(_, node)| node.hello.host.clone()).collect();
        let is_seen = |rank: u32| self.nodes.values().any(|node| node.hello.node_rank == Some(rank));
        let missing: Vec<_> =
            (0..most).filter(|rank| !is_seen(*rank)).map(|rank| rank.to_string()).take(32).collect();
        let reason = format!(
            "{} of {wanted} nodes came within {:?} (here: {}; not seen: --node-rank {})",
            there.len(),
            self.settings.join_timeout,
            there.join(", "),
            missing.join(", ")
        );
        self.end(false, reason, None)
    }

    fn end(&mut self, success: bool, reason: String, no_restart: Option<String>) -> Vec<Action> {
        if self.is_closed() {
            return Vec::new();
        }
        self.phase = Phase::Closed { success, reason, no_restart };
        let Some(closed) = self.last_word() else { return Vec::new() };
        self.nodes.keys().map(|peer| Action::Send(*peer, closed.clone())).collect()
    }

    /// What agents are told once the job is over.
    fn last_word(&self) -> Option<ToAgent> {
        let Phase::Closed { success, reason, no_restart } = &self.phase else { return None };
        let (reason, no_restart) = (reason.clone(), no_restart.clone());
        Some(ToAgent::Closed { success: *success, reason, no_restart })
    }

    fn describe(&self, peer: Peer) -> String {
        let Some(node) = self.nodes.get(&peer) else { return "an unknown node".into() };
        let hello = &node.hello;
        match node.place.or(hello.node_rank) {
            Some(rank) => format!("node {rank} (host {}, pid {})", hello.host, hello.pid),
            None => format!("a node (host {}, pid {})", hello.host, hello.pid),
        }
    }
}

fn refuse(peer: Peer, reason: String) -> Vec<Action> {
    vec![Action::Send(peer, ToAgent::Refused { reason }), Action::Close(peer)]
}
