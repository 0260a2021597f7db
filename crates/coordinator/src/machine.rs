mod standstill;
mod termination;

use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, NodeAssignment, Round, ToAgent, ToCoordinator};

use crate::nodes::{Lobby, Node, Nodes, Peer, host_label};
use crate::record::{Outcome, RoundVerdict};
use crate::restarts::{Failure, Restarts};
use crate::{Record, admission, rank_assignment};
use standstill::Standstill;
use termination::Departure;

/// Constants of a job.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Identifier of the job.
    pub run_id: String,
    /// Time in which the minimum of nodes must have joined.
    pub join_timeout: Duration,
    /// Time in which further nodes may join once the minimum has.
    pub last_call: Duration,
    /// `<MMDDHHmm>_<random>`.
    pub run_stamp: String,
}

/// An input of the coordinator.
#[expect(
    clippy::large_enum_variant,
    reason = "a hello is larger than the rest, and comes once per connection"
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Peer, ToCoordinator),
    /// A connection ended.
    Lost(Peer),
    /// The time of [`Coordinator::deadline`] has come.
    Tick,
}

/// An output of the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Sends a message.
    Send(Peer, ToAgent),
    /// Closes a connection after its queued messages.
    Close(Peer),
    /// Empties the store for a new round.
    ClearStore,
}

enum Phase {
    /// Nodes join the next round.
    Joining(Joining),
    /// A round runs. `finished` and the nodes of `standstill` are disjoint subsets of `members`.
    Running { members: BTreeSet<Peer>, finished: BTreeSet<Peer>, standstill: Standstill },
    /// The job is over. No event leaves this phase.
    Closed(Outcome),
}

#[derive(Default)]
struct Joining {
    since: Duration,
    /// The earliest start of the round: the end of the backoff.
    not_before: Duration,
    lobby: Lobby,
    /// The time since which the minimum of nodes waits.
    enough_since: Option<Duration>,
    /// Whether a node of the last round was preempted. Then a join timeout ends the job as
    /// preempted.
    preempted: bool,
}

/// The state machine of a job.
///
/// Phases: Joining → Running → Joining → … → Closed. `Joining` ends when [`Coordinator::deadline`]
/// or a join makes the round due, `Running` by a failure, a departure or a newcomer, and both end
/// the job by a verdict, a join timeout, or the success of all nodes. `round` is the number of the
/// running or the next round. A round that ends increases it, so that late messages of an earlier
/// round are recognized. Invariants: see the module.
pub struct Coordinator {
    settings: Settings,
    nodes: Nodes,
    phase: Phase,
    round: u64,
    restarts: Restarts,
    verdict: Option<RoundVerdict>,
}

impl Coordinator {
    /// Creates the coordinator of a new job.
    pub fn new(settings: Settings) -> Self {
        let phase = Phase::Joining(Joining::default());
        let (nodes, restarts) = (Nodes::default(), Restarts::default());
        Self { settings, nodes, phase, round: 0, restarts, verdict: None }
    }

    /// Continues a job from the record of another coordinator, and its clock from the time of the
    /// record.
    pub fn resume(settings: Settings, record: Record) -> Self {
        let phase = match record.closed {
            Some(outcome) => Phase::Closed(outcome),
            None if record.finished => Phase::Closed(Outcome {
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
        let Record { next_round: round, restarts, verdict, .. } = record;
        Self { settings, nodes: Nodes::default(), phase, round, restarts, verdict }
    }

    /// Returns the record from which another coordinator continues the job.
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
            verdict: self.verdict.clone(),
            run_stamp: self.settings.run_stamp.clone(),
            finished: matches!(&self.phase, Phase::Running { finished, .. } if !finished.is_empty()),
            closed: match &self.phase {
                Phase::Closed(outcome) => Some(outcome.clone()),
                _ => None,
            },
        }
    }

    /// Returns the time at which [`Event::Tick`] is due; `None` if no timeout is pending.
    pub fn deadline(&self) -> Option<Duration> {
        let Phase::Joining(joining) = &self.phase else { return None };
        Some(self.due(joining).unwrap_or(joining.since + self.settings.join_timeout))
    }

    /// Returns the time at which the round starts with the nodes that wait; `None` if it needs more
    /// nodes first.
    fn due(&self, joining: &Joining) -> Option<Duration> {
        let enough_since = joining.enough_since?;
        // Members of the last round are members of this one (RV-8), so it waits for those that
        // still stop their ranks.
        if joining.lobby.has_missing_members() {
            return None;
        }
        let (_, max_nodes) = self.nnodes();
        let members = joining.lobby.count().min(max_nodes as usize);
        let nobody_else = self.round > 0 && members == self.nodes.len();
        match members == max_nodes as usize || nobody_else {
            true => Some(joining.not_before),
            false => Some((enough_since + self.settings.last_call).max(joining.not_before)),
        }
    }

    /// Returns whether the job is over.
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_))
    }

    /// Handles an event. `now` is the time since the start of the job.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            Event::Message(peer, message) => self.message(now, peer, message),
            Event::Lost(peer) => self.remove_node(now, peer, Departure::Lost),
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
            ToCoordinator::Failed { round, reason, uptime, fatal_reason } => {
                self.failed(now, peer, round, Failure { reason, uptime, fatal_reason })
            }
            ToCoordinator::Finished { round } => self.finished(peer, round),
            ToCoordinator::Progress { round, progress } => self.progress(peer, round, progress),
            ToCoordinator::Leave { reason, preempted } => {
                let mut actions = vec![Action::Close(peer)];
                actions.extend(self.remove_node(now, peer, Departure::Left { reason, preempted }));
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
        match self.nodes.by_agent_id(hello.agent_id) {
            // A hello of an older connection that arrives after the newer one's.
            Some(later) if later > peer => return vec![Action::Close(peer)],
            Some(earlier) => {
                actions.push(Action::Close(earlier));
                actions.extend(self.remove_node(now, earlier, Departure::Replaced));
            }
            None => {}
        }
        actions.extend(self.admit(peer, hello));
        actions
    }

    fn admit(&mut self, peer: Peer, hello: Hello) -> Vec<Action> {
        if let Some(closed) = self.closing_message() {
            return vec![Action::Send(peer, closed), Action::Close(peer)];
        }
        let has_begun = self.round > 0 || matches!(self.phase, Phase::Running { .. });
        match admission::check(&self.settings.run_id, &self.nodes, &hello, has_begun) {
            Ok(()) => {
                let last_node_rank = hello.last_node_rank;
                // The server has allowed the other addresses already; messages name the first.
                let mut hello = hello;
                hello.addresses.truncate(1);
                hello.addresses.shrink_to_fit();
                let node =
                    Node { hello, last_node_rank, is_member: false, is_waiting: false, notified: None };
                if let Phase::Joining(joining) = &mut self.phase {
                    joining.lobby.add(peer, &node);
                }
                self.nodes.insert(peer, node);
                Vec::new()
            }
            Err(reason) => refuse(peer, reason),
        }
    }

    /// Returns the minimum and the maximum of nodes. Admission makes all agents agree on them.
    fn nnodes(&self) -> (u32, u32) {
        self.nodes.any().map_or((1, 1), |node| node.hello.nnodes)
    }

    fn join(&mut self, now: Duration, peer: Peer) -> Vec<Action> {
        let (_, max_nodes) = self.nnodes();
        let is_member = self.is_member(peer);
        let Some(node) = self.nodes.get_mut(peer) else { return Vec::new() };
        match &mut self.phase {
            Phase::Joining(joining) => {
                joining.lobby.remove(peer, node);
                node.is_waiting = true;
                joining.lobby.add(peer, node);
                self.start_if_due(now)
            }
            Phase::Running { .. } if is_member => Vec::new(),
            Phase::Running { members, finished, .. } => {
                node.is_waiting = true;
                // A node has finished, so the others soon will: a new round would repeat finished
                // work.
                if members.len() < max_nodes as usize && finished.is_empty() {
                    let reason = format!("{} has come", self.describe(peer));
                    return self.next_round(now, Duration::ZERO, &reason, true);
                }
                let nodes = members.len();
                let reason =
                    format!("the job has its {nodes} nodes; this one takes the place of one that goes");
                vec![self.enqueue(peer, reason)]
            }
            Phase::Closed(_) => Vec::new(),
        }
    }

    fn start_if_due(&mut self, now: Duration) -> Vec<Action> {
        let (min_nodes, max_nodes) = self.nnodes();
        let Phase::Joining(joining) = &mut self.phase else { return Vec::new() };
        let enough = joining.lobby.count() >= min_nodes as usize;
        joining.enough_since = enough.then(|| joining.enough_since.unwrap_or(now));
        let Phase::Joining(joining) = &self.phase else { return Vec::new() };
        match self.due(joining) {
            Some(due) if now >= due => self.start_round(max_nodes as usize),
            _ => Vec::new(),
        }
    }

    fn start_round(&mut self, max_nodes: usize) -> Vec<Action> {
        let members = rank_assignment::select_members(self.nodes.all(), max_nodes);
        let rank_assignment = rank_assignment::assign_node_ranks(self.nodes.all(), &members);
        let assignments = rank_assignment::assignments(self.nodes.all(), &rank_assignment);
        let view = Round {
            number: self.round,
            restart_count: self.restarts.count(),
            nodes: u32::try_from(assignments.len()).unwrap_or(u32::MAX),
            world_size: assignments.iter().map(|part| part.local_world_size).sum(),
            run_stamp: self.settings.run_stamp.clone(),
            ranks_store: rank_assignment::ranks_store(self.nodes.all(), &rank_assignment),
            assignment: NodeAssignment::default(),
        };
        let notified = |(peer, assignment): (&Peer, NodeAssignment)| {
            Action::Send(*peer, ToAgent::RoundStarted(Round { assignment, ..view.clone() }))
        };
        let mut actions = vec![Action::ClearStore];
        actions.extend(rank_assignment.iter().zip(assignments).map(notified));
        self.nodes.iter_mut().for_each(|(_, node)| (node.last_node_rank, node.is_member) = (None, false));
        for (last_node_rank, peer) in (0..).zip(&rank_assignment) {
            if let Some(node) = self.nodes.get_mut(*peer) {
                (node.last_node_rank, node.is_member, node.is_waiting) = (Some(last_node_rank), true, false);
            }
        }
        let left = self.nodes.all().iter().filter(|(_, node)| node.is_waiting);
        actions.extend(left.map(|(peer, _)| {
            let reason = "there are enough nodes without this one; it takes the place of one that goes";
            self.enqueue(*peer, reason.into())
        }));
        self.phase = Phase::Running {
            members: rank_assignment.into_iter().collect(),
            finished: BTreeSet::new(),
            standstill: Standstill::default(),
        };
        actions
    }

    fn enqueue(&self, peer: Peer, reason: String) -> Action {
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
        self.close_for_missing_nodes()
    }

    fn describe(&self, peer: Peer) -> String {
        let Some(node) = self.nodes.get(peer) else { return "an unknown node".into() };
        let hello = &node.hello;
        match node.last_node_rank.or(hello.node_rank) {
            Some(rank) => format!("node {rank} (host {}, pid {})", host_label(hello), hello.pid),
            None => format!("a node (host {}, pid {})", host_label(hello), hello.pid),
        }
    }
}

fn refuse(peer: Peer, reason: String) -> Vec<Action> {
    vec![Action::Send(peer, ToAgent::Refused { reason }), Action::Close(peer)]
}
