use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, Member, Round, ToAgent, ToCoordinator};

use super::nodes::{Gathering, Node, Nodes};
use super::record::Judged;
use super::restarts::{Failure, Restarts, Verdict};
use super::{Record, admission, places};

/// Nodes that a message names; it goes to all of them.
const NAMED: usize = 32;

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
    gathering: Gathering,
    /// Since when there have been enough nodes.
    enough_since: Option<Duration>,
}

enum Gone {
    Lost,
    /// Its agent has another connection.
    Replaced,
    Left(String),
}

/// The machine. See the module for its invariants.
pub struct Coordinator {
    settings: Settings,
    nodes: Nodes,
    phase: Phase,
    round: u64,
    restarts: Restarts,
    judged: Option<Judged>,
}

impl Coordinator {
    /// A job that nobody has joined.
    pub fn new(settings: Settings) -> Self {
        let phase = Phase::Joining(Joining::default());
        let (nodes, restarts) = (Nodes::default(), Restarts::default());
        Self { settings, nodes, phase, round: 0, restarts, judged: None }
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
            None => Phase::Joining(Joining {
                since: record.now,
                not_before: record.not_before,
                ..Joining::default()
            }),
        };
        let settings = Settings { run_stamp: record.run_stamp, ..settings };
        let Record { next_round: round, restarts, judged, .. } = record;
        Self { settings, nodes: Nodes::default(), phase, round, restarts, judged }
    }

    /// What another coordinator needs in order to go on.
    pub fn record(&self, now: Duration) -> Record {
        let running = matches!(self.phase, Phase::Running { .. });
        Record {
            now,
            next_round: self.round + u64::from(running),
            not_before: match &self.phase {
                Phase::Joining(joining) => joining.not_before,
                _ => Duration::ZERO,
            },
            restarts: self.restarts.clone(),
            judged: self.judged.clone(),
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

    /// When the round may start with those that wait; `None` while somebody must come first.
    fn due(&self, joining: &Joining) -> Option<Duration> {
        let enough_since = joining.enough_since?;
        // Members of the last round are in this one: those that still stop their ranks are waited for.
        if joining.gathering.is_anybody_missing() {
            return None;
        }
        let (_, most) = self.nnodes();
        let members = joining.gathering.count().min(most as usize);
        let nobody_else = self.round > 0 && members == self.nodes.len();
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
            return self.hello(now, peer, hello);
        }
        if self.nodes.get(peer).is_none() {
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

    fn hello(&mut self, now: Duration, peer: Peer, hello: Hello) -> Vec<Action> {
        if self.nodes.get(peer).is_some() {
            return refuse(peer, "an agent says hello once".into());
        }
        if hello.run_stamp.as_ref().is_some_and(|known| *known != self.settings.run_stamp) {
            let what = "the coordinator of the job that this agent was in is gone, and so is its record";
            return refuse(
                peer,
                format!("{what}: start the agent again to be in the job that has begun since"),
            );
        }
        let mut actions = Vec::new();
        match self.nodes.of_agent(hello.agent) {
            // What an agent said before it gave up comes late.
            Some(later) if later > peer => return vec![Action::Close(peer)],
            Some(earlier) => {
                actions.push(Action::Close(earlier));
                actions.extend(self.gone(now, earlier, Gone::Replaced));
            }
            None => {}
        }
        actions.extend(self.admit(peer, hello));
        actions
    }

    fn admit(&mut self, peer: Peer, hello: Hello) -> Vec<Action> {
        if let Some(closed) = self.last_word() {
            return vec![Action::Send(peer, closed), Action::Close(peer)];
        }
        let begun = self.round > 0 || matches!(self.phase, Phase::Running { .. });
        match admission::check(&self.settings.run_id, &self.nodes, &hello, begun) {
            Ok(()) => {
                // It had one under another coordinator, or before it was cut off.
                let place = hello.place;
                // They were for the host's own use.
                let hello = Hello { addresses: Vec::new(), ..hello };
                let node = Node { hello, place, is_member: false, waits: false, told: None };
                if let Phase::Joining(joining) = &mut self.phase {
                    joining.gathering.add(peer, &node);
                }
                self.nodes.insert(peer, node);
                Vec::new()
            }
            Err(reason) => refuse(peer, reason),
        }
    }

    /// Fewest and most nodes of a round; all agents say the same.
    fn nnodes(&self) -> (u32, u32) {
        self.nodes.any().map_or((1, 1), |node| node.hello.nnodes)
    }

    fn join(&mut self, now: Duration, peer: Peer) -> Vec<Action> {
        let (_, most) = self.nnodes();
        let is_member = self.is_member(peer);
        let Some(node) = self.nodes.get_mut(peer) else { return Vec::new() };
        match &mut self.phase {
            Phase::Joining(joining) => {
                joining.gathering.remove(peer, node);
                node.waits = true;
                joining.gathering.add(peer, node);
                self.start_if_due(now)
            }
            Phase::Running { .. } if is_member => Vec::new(),
            Phase::Running { members, finished } => {
                node.waits = true;
                // Once a node has finished, the others soon will.
                if members.len() < most as usize && finished.is_empty() {
                    let reason = format!("{} has come", self.describe(peer));
                    return self.next_round(now, Duration::ZERO, &reason);
                }
                let nodes = members.len();
                let reason =
                    format!("the job has its {nodes} nodes; this one takes the place of one that goes");
                vec![self.put_off(peer, reason)]
            }
            Phase::Closed { .. } => Vec::new(),
        }
    }

    fn start_if_due(&mut self, now: Duration) -> Vec<Action> {
        let (fewest, most) = self.nnodes();
        let Phase::Joining(joining) = &mut self.phase else { return Vec::new() };
        let enough = joining.gathering.count() >= fewest as usize;
        joining.enough_since = enough.then(|| joining.enough_since.unwrap_or(now));
        let Phase::Joining(joining) = &self.phase else { return Vec::new() };
        match self.due(joining) {
            Some(due) if now >= due => self.start_round(most as usize),
            _ => Vec::new(),
        }
    }

    fn start_round(&mut self, most: usize) -> Vec<Action> {
        let members = places::choose(self.nodes.all(), most);
        let places = places::arrange(self.nodes.all(), &members);
        let parts = places::parts(self.nodes.all(), &places);
        let view = Round {
            number: self.round,
            restart_count: self.restarts.count(),
            nodes: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            world_size: parts.iter().map(|part| part.local_world_size).sum(),
            run_stamp: self.settings.run_stamp.clone(),
            you: Member::default(),
        };
        let told = |(peer, you): (&Peer, Member)| {
            Action::Send(*peer, ToAgent::RoundStarted(Round { you, ..view.clone() }))
        };
        let mut actions = vec![Action::ClearStore];
        actions.extend(places.iter().zip(parts).map(told));
        self.nodes.iter_mut().for_each(|(_, node)| (node.place, node.is_member) = (None, false));
        for (place, peer) in (0..).zip(&places) {
            if let Some(node) = self.nodes.get_mut(*peer) {
                (node.place, node.is_member, node.waits) = (Some(place), true, false);
            }
        }
        let left = self.nodes.all().iter().filter(|(_, node)| node.waits);
        actions.extend(left.map(|(peer, _)| {
            let reason = "there are enough nodes without this one; it takes the place of one that goes";
            self.put_off(*peer, reason.into())
        }));
        self.phase = Phase::Running { members: places.into_iter().collect(), finished: BTreeSet::new() };
        actions
    }

    fn put_off(&self, peer: Peer, reason: String) -> Action {
        Action::Send(peer, ToAgent::Waiting { run_stamp: self.settings.run_stamp.clone(), reason })
    }

    /// Judges a failure, unless that of its round or of a later one was judged before. Whoever failed may have lost its coordinator, or
    /// its connection, with its report on the way; it reports again where it comes back, and its round is over by then.
    fn failed(&mut self, now: Duration, peer: Peer, round: u64, failure: Failure) -> Vec<Action> {
        let is_running = matches!(self.phase, Phase::Running { .. });
        if self.is_closed() || round > self.round || (round == self.round && !is_running) {
            return Vec::new();
        }
        match &self.judged {
            Some(judged) if judged.round == round => return self.tell_verdict([peer]),
            Some(judged) if judged.round > round => return Vec::new(),
            _ => {}
        }
        let Some(policy) = self.nodes.get(peer).map(|node| node.hello.restarts) else { return Vec::new() };
        let verdict = self.restarts.decide(&policy, now, &failure);
        let what = format!("{}: {}", self.describe(peer), failure.reason);
        let (after, said) = match verdict {
            Verdict::GiveUp { why } => return self.end(false, what, why),
            Verdict::Restart { after, note } => (after, format!("{what}; {note}")),
        };
        self.judged = Some(Judged { round, said: said.clone() });
        match &mut self.phase {
            Phase::Running { members, .. } if round == self.round => {
                for member in members.iter() {
                    if let Some(node) = self.nodes.get_mut(*member) {
                        node.told = Some(round);
                    }
                }
                let mut actions = self.next_round(now, after, &said);
                // It may have come back before its first connection was missed.
                actions.extend(self.tell_verdict([peer]));
                actions
            }
            Phase::Joining(joining) => {
                joining.not_before = joining.not_before.max(now + after);
                let everybody: Vec<Peer> = self.nodes.all().keys().copied().collect();
                self.tell_verdict(everybody)
            }
            // The ranks were started again since.
            _ => self.tell_verdict([peer]),
        }
    }

    /// Tells those that have not been told what became of the last failure.
    fn tell_verdict(&mut self, peers: impl IntoIterator<Item = Peer>) -> Vec<Action> {
        let Some(Judged { round, said }) = &self.judged else { return Vec::new() };
        let mut actions = Vec::new();
        for peer in peers {
            let Some(node) = self.nodes.get_mut(peer).filter(|node| node.told != Some(*round)) else {
                continue;
            };
            node.told = Some(*round);
            actions.push(Action::Send(peer, ToAgent::RoundBroken { round: *round, reason: said.clone() }));
        }
        actions
    }

    fn is_member(&self, peer: Peer) -> bool {
        matches!(&self.phase, Phase::Running { members, .. } if members.contains(&peer))
    }

    /// Ends the round for its members. Those that wait for a place are in already; one that has only said hello may have ranks that end.
    fn next_round(&mut self, now: Duration, pause: Duration, reason: &str) -> Vec<Action> {
        let Phase::Running { members, .. } = &self.phase else { return Vec::new() };
        let message = ToAgent::RoundBroken { round: self.round, reason: reason.to_owned() };
        let there = members.iter().filter(|peer| self.nodes.get(**peer).is_some());
        let mut actions: Vec<_> = there.map(|peer| Action::Send(*peer, message.clone())).collect();
        self.round += 1;
        let gathering = Gathering::of(&self.nodes);
        self.phase =
            Phase::Joining(Joining { since: now, not_before: now + pause, gathering, enough_since: None });
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
        let Some(node) = self.nodes.remove(peer) else { return Vec::new() };
        let (fewest, most) = node.hello.nnodes;
        let told_to = matches!(how, Gone::Left(_));
        let goes_on = fewest < most || (!told_to && node.hello.restarts.max_restarts > 0);
        let reason = match how {
            Gone::Lost => format!("lost {who}: its agent is gone"),
            Gone::Replaced => format!("lost {who}: its agent has come back"),
            Gone::Left(reason) => format!("{who} left: {reason}"),
        };
        match &mut self.phase {
            Phase::Closed { .. } => Vec::new(),
            // One that had finished is not missed, nor one that only waited.
            Phase::Running { members, finished } if !members.contains(&peer) || finished.contains(&peer) => {
                Vec::new()
            }
            Phase::Joining(joining) if self.round == 0 || node.place.is_none() || goes_on => {
                joining.gathering.remove(peer, &node);
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
        let (fewest, most) = self.nodes.any().map_or((0, 0), |node| node.hello.nnodes);
        let wanted = if fewest == most { most.to_string() } else { format!("at least {fewest}") };
        let there: Vec<&str> = self
            .nodes
            .all()
            .values()
            .filter(|node| node.waits)
            .map(|node| node.hello.host.as_str())
            .collect();
        let missing: Vec<String> = (0..most)
            .filter(|rank| self.nodes.asking(*rank).is_none())
            .map(|rank| rank.to_string())
            .take(NAMED + 1)
            .collect();
        let reason = format!(
            "{} of {wanted} nodes came within {:?} (here: {}; not seen: --node-rank {})",
            there.len(),
            self.settings.join_timeout,
            listed(&there),
            listed(&missing)
        );
        self.end(false, reason, None)
    }

    fn end(&mut self, success: bool, reason: String, no_restart: Option<String>) -> Vec<Action> {
        if self.is_closed() {
            return Vec::new();
        }
        self.round += u64::from(matches!(self.phase, Phase::Running { .. }));
        self.phase = Phase::Closed { success, reason, no_restart };
        let Some(closed) = self.last_word() else { return Vec::new() };
        self.nodes.all().keys().map(|peer| Action::Send(*peer, closed.clone())).collect()
    }

    /// What agents are told once the job is over.
    fn last_word(&self) -> Option<ToAgent> {
        let Phase::Closed { success, reason, no_restart } = &self.phase else { return None };
        let (reason, no_restart) = (reason.clone(), no_restart.clone());
        Some(ToAgent::Closed { success: *success, reason, no_restart })
    }

    fn describe(&self, peer: Peer) -> String {
        let Some(node) = self.nodes.get(peer) else { return "an unknown node".into() };
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

/// The first of them.
fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let named: Vec<&str> = names.iter().take(NAMED).map(AsRef::as_ref).collect();
    let more = if names.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", named.join(", "))
}
