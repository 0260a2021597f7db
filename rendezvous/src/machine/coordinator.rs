mod endings;
mod standstill;

use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, Member, Round, ToAgent, ToCoordinator};

use super::nodes::{Gathering, Node, Nodes};
use super::record::{Ending, Judged};
use super::restarts::{Failure, Restarts};
use super::{Record, admission, places};
use endings::Gone;
use standstill::Standstill;

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
#[expect(
    clippy::large_enum_variant,
    reason = "a hello is larger than the rest, and comes once per connection"
)]
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
    Running { members: BTreeSet<Peer>, finished: BTreeSet<Peer>, standstill: Standstill },
    /// The job is over.
    Closed(Ending),
}

#[derive(Default)]
struct Joining {
    since: Duration,
    /// The round does not start before.
    not_before: Duration,
    gathering: Gathering,
    /// Since when there have been enough nodes.
    enough_since: Option<Duration>,
    /// Whether a node is missed because it was preempted.
    preempted: bool,
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
            Some(ending) => Phase::Closed(ending),
            None if record.finished => Phase::Closed(Ending {
                success: false,
                reason: "the coordinator was lost while nodes finished: what they did cannot be done again"
                    .into(),
                no_restart: None,
                preempted: false,
            }),
            None => Phase::Joining(Joining {
                since: record.now,
                not_before: record.not_before,
                preempted: record.preempted,
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
            preempted: matches!(&self.phase, Phase::Joining(joining) if joining.preempted),
            restarts: self.restarts.clone(),
            judged: self.judged.clone(),
            run_stamp: self.settings.run_stamp.clone(),
            finished: matches!(&self.phase, Phase::Running { finished, .. } if !finished.is_empty()),
            closed: match &self.phase {
                Phase::Closed(ending) => Some(ending.clone()),
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
        matches!(self.phase, Phase::Closed(_))
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
            ToCoordinator::Progress { round, progress } => self.progress(peer, round, progress),
            ToCoordinator::Leave { reason, preempted } => {
                let mut actions = vec![Action::Close(peer)];
                actions.extend(self.gone(now, peer, Gone::Left { reason, preempted }));
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
                // The others were for the host's own use.
                let mut hello = hello;
                hello.addresses.truncate(1);
                hello.addresses.shrink_to_fit();
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
            Phase::Running { members, finished, .. } => {
                node.waits = true;
                // Once a node has finished, the others soon will.
                if members.len() < most as usize && finished.is_empty() {
                    let reason = format!("{} has come", self.describe(peer));
                    return self.next_round(now, Duration::ZERO, &reason, true);
                }
                let nodes = members.len();
                let reason =
                    format!("the job has its {nodes} nodes; this one takes the place of one that goes");
                vec![self.put_off(peer, reason)]
            }
            Phase::Closed(_) => Vec::new(),
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
            ranks_store: places::ranks_store(self.nodes.all(), &places),
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
        self.phase = Phase::Running {
            members: places.into_iter().collect(),
            finished: BTreeSet::new(),
            standstill: Standstill::default(),
        };
        actions
    }

    fn put_off(&self, peer: Peer, reason: String) -> Action {
        Action::Send(peer, ToAgent::Waiting { run_stamp: self.settings.run_stamp.clone(), reason })
    }

    fn is_member(&self, peer: Peer) -> bool {
        matches!(&self.phase, Phase::Running { members, .. } if members.contains(&peer))
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let started = self.start_if_due(now);
        let Phase::Joining(joining) = &self.phase else { return started };
        if self.due(joining).is_some() || now < joining.since + self.settings.join_timeout {
            return started;
        }
        self.give_up()
    }

    fn describe(&self, peer: Peer) -> String {
        let Some(node) = self.nodes.get(peer) else { return "an unknown node".into() };
        let hello = &node.hello;
        match node.place.or(hello.node_rank) {
            Some(rank) => format!("node {rank} (host {}, pid {})", host(hello), hello.pid),
            None => format!("a node (host {}, pid {})", host(hello), hello.pid),
        }
    }
}

/// Name of an agent's host and the address that it came from, since hosts may share a name. On one machine the name says it.
pub(super) fn host(hello: &Hello) -> String {
    match hello.addresses.first().filter(|address| !address.is_loopback()) {
        Some(address) => format!("{} at {address}", hello.host),
        None => hello.host.clone(),
    }
}

fn refuse(peer: Peer, reason: String) -> Vec<Action> {
    vec![Action::Send(peer, ToAgent::Refused { reason }), Action::Close(peer)]
}
