//! The ends of a round and of the job: failures, departures, and success.

use std::time::Duration;

use ice_proto::rendezvous::ToAgent;

use super::super::nodes::Lobby;
use super::super::record::{Outcome, RoundVerdict};
use super::super::restarts::{Decision, Failure};
use super::{Action, Coordinator, Joining, Peer, Phase, host_label};

/// Maximum of nodes that a message names, since all nodes receive it.
const MAX_NAMED_NODES: usize = 32;

/// The way in which a node has left.
pub(super) enum Departure {
    Lost,
    /// Its agent has opened another connection.
    Replaced,
    Left {
        reason: String,
        preempted: bool,
    },
}

impl Coordinator {
    /// Judges a failure, unless that of its round or of a later one was judged before (RV-11).
    ///
    /// A report may be lost with the connection or with the coordinator, so an agent repeats it on
    /// its next connection. By then the round may be over, and the report may reach another
    /// coordinator, whose record holds the last verdict.
    pub(super) fn failed(&mut self, now: Duration, peer: Peer, round: u64, failure: Failure) -> Vec<Action> {
        let is_running = matches!(self.phase, Phase::Running { .. });
        if self.is_closed() || round > self.round || (round == self.round && !is_running) {
            return Vec::new();
        }
        match &self.verdict {
            Some(verdict) if verdict.round == round => return self.send_verdict([peer]),
            Some(verdict) if verdict.round > round => return Vec::new(),
            _ => {}
        }
        let Some(policy) = self.nodes.get(peer).map(|node| node.hello.restarts) else { return Vec::new() };
        let decision = self.restarts.decide(&policy, now, &failure);
        let what = format!("{}: {}", self.describe(peer), failure.reason);
        let (after, text) = match decision {
            Decision::Abort { why } => return self.end(false, what, why),
            Decision::Restart { after, note } => (after, format!("{what}; {note}")),
        };
        self.verdict = Some(RoundVerdict { round, text: text.clone() });
        match &mut self.phase {
            Phase::Running { members, .. } if round == self.round => {
                for member in members.iter() {
                    if let Some(node) = self.nodes.get_mut(*member) {
                        node.notified = Some(round);
                    }
                }
                let mut actions = self.next_round(now, after, &text, false);
                // The agent may be on a second connection, which is not a member yet, before its
                // first one is lost.
                actions.extend(self.send_verdict([peer]));
                actions
            }
            Phase::Joining(joining) => {
                joining.not_before = joining.not_before.max(now + after);
                let all: Vec<Peer> = self.nodes.all().keys().copied().collect();
                self.send_verdict(all)
            }
            // A later round runs by now: the verdict counts, and the round continues.
            _ => self.send_verdict([peer]),
        }
    }

    /// Sends the last verdict to the peers that have not received it.
    fn send_verdict(&mut self, peers: impl IntoIterator<Item = Peer>) -> Vec<Action> {
        let Some(RoundVerdict { round, text }) = &self.verdict else { return Vec::new() };
        let mut actions = Vec::new();
        for peer in peers {
            let Some(node) = self.nodes.get_mut(peer).filter(|node| node.notified != Some(*round)) else {
                continue;
            };
            node.notified = Some(*round);
            let broken = ToAgent::RoundBroken { round: *round, reason: text.clone(), graceful: false };
            actions.push(Action::Send(peer, broken));
        }
        actions
    }

    pub(super) fn finished(&mut self, peer: Peer, round: u64) -> Vec<Action> {
        if round != self.round || !self.is_member(peer) {
            return Vec::new();
        }
        let Phase::Running { members, finished, standstill } = &mut self.phase else { return Vec::new() };
        finished.insert(peer);
        standstill.remove(peer);
        match members.is_subset(finished) {
            true => self.end(true, "all ranks finished".into(), None),
            false => self.check_standstill(),
        }
    }

    /// Removes a node that is lost or leaves. An elastic job continues with the others, or waits
    /// for more. A job of a fixed size waits for a lost node to return if restarts are allowed, and
    /// ends otherwise.
    pub(super) fn remove_node(&mut self, now: Duration, peer: Peer, how: Departure) -> Vec<Action> {
        let who = self.describe(peer);
        let Some(node) = self.nodes.remove(peer) else { return Vec::new() };
        let (min_nodes, max_nodes) = node.hello.nnodes;
        let told_to = matches!(how, Departure::Left { .. });
        let preempted = matches!(how, Departure::Left { preempted: true, .. });
        let continues = min_nodes < max_nodes || (!told_to && node.hello.restarts.max_restarts > 0);
        let reason = match how {
            Departure::Lost => format!("lost {who}: its agent is gone"),
            Departure::Replaced => format!("lost {who}: its agent has come back"),
            Departure::Left { reason, .. } => format!("{who} left: {reason}"),
        };
        match &mut self.phase {
            Phase::Closed(_) => Vec::new(),
            // A node that has finished, or that only waited, does not end the round.
            Phase::Running { members, finished, .. }
                if !members.contains(&peer) || finished.contains(&peer) =>
            {
                Vec::new()
            }
            Phase::Joining(joining) if self.round == 0 || node.last_node_rank.is_none() || continues => {
                joining.lobby.remove(peer, &node);
                joining.preempted |= preempted;
                self.start_if_due(now)
            }
            // Finished work of the other nodes cannot be repeated, so the job ends below.
            Phase::Running { finished, .. } if continues && finished.is_empty() => {
                let left = self.nodes.len();
                let note = match left >= min_nodes as usize {
                    true => {
                        format!("{reason}; going on with {left} {}", if left == 1 { "node" } else { "nodes" })
                    }
                    false => format!("{reason}; waiting for another node, since {min_nodes} are needed"),
                };
                let actions = self.next_round(now, Duration::ZERO, &note, false);
                if let Phase::Joining(joining) = &mut self.phase {
                    joining.preempted = preempted;
                }
                actions
            }
            _ => self.close(Outcome { success: false, reason, no_restart: None, preempted }),
        }
    }

    /// Ends the round for its members. Nodes that wait are in the lobby of the next one. A node
    /// that has said hello and has not joined may still stop its ranks, so the round waits for it.
    pub(super) fn next_round(
        &mut self,
        now: Duration,
        pause: Duration,
        reason: &str,
        graceful: bool,
    ) -> Vec<Action> {
        let Phase::Running { members, .. } = &self.phase else { return Vec::new() };
        let message = ToAgent::RoundBroken { round: self.round, reason: reason.to_owned(), graceful };
        let there = members.iter().filter(|peer| self.nodes.get(**peer).is_some());
        let mut actions: Vec<_> = there.map(|peer| Action::Send(*peer, message.clone())).collect();
        self.round += 1;
        let lobby = Lobby::of(&self.nodes);
        self.phase =
            Phase::Joining(Joining { since: now, not_before: now + pause, lobby, ..Joining::default() });
        actions.extend(self.start_if_due(now));
        actions
    }

    /// Closes the job after the join timeout. If a missing node was preempted, the job ends as
    /// preempted.
    pub(super) fn close_for_missing_nodes(&mut self) -> Vec<Action> {
        let preempted = matches!(&self.phase, Phase::Joining(joining) if joining.preempted);
        let (min_nodes, max_nodes) = self.nodes.any().map_or((0, 0), |node| node.hello.nnodes);
        let wanted =
            if min_nodes == max_nodes { max_nodes.to_string() } else { format!("at least {min_nodes}") };
        let there: Vec<String> = self
            .nodes
            .all()
            .values()
            .filter(|node| node.is_waiting)
            .map(|node| host_label(&node.hello))
            .collect();
        let missing: Vec<String> = (0..max_nodes)
            .filter(|rank| self.nodes.requesting(*rank).is_none())
            .map(|rank| rank.to_string())
            .take(MAX_NAMED_NODES + 1)
            .collect();
        let reason = format!(
            "{} of {wanted} nodes came within {:?} (here: {}; not seen: --node-rank {})",
            there.len(),
            self.settings.join_timeout,
            listed(&there),
            listed(&missing)
        );
        self.close(Outcome { success: false, reason, no_restart: None, preempted })
    }

    fn end(&mut self, success: bool, reason: String, no_restart: Option<String>) -> Vec<Action> {
        self.close(Outcome { success, reason, no_restart, preempted: false })
    }

    fn close(&mut self, outcome: Outcome) -> Vec<Action> {
        if self.is_closed() {
            return Vec::new();
        }
        self.round += u64::from(matches!(self.phase, Phase::Running { .. }));
        self.phase = Phase::Closed(outcome);
        let Some(closed) = self.closing_message() else { return Vec::new() };
        self.nodes.all().keys().map(|peer| Action::Send(*peer, closed.clone())).collect()
    }

    /// Returns the last message of a closed job.
    pub(super) fn closing_message(&self) -> Option<ToAgent> {
        let Phase::Closed(outcome) = &self.phase else { return None };
        let Outcome { success, reason, no_restart, preempted } = outcome.clone();
        Some(ToAgent::Closed { success, reason, no_restart, preempted })
    }
}

/// Joins names into a list, with … after the first [`MAX_NAMED_NODES`].
fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let named: Vec<&str> = names.iter().take(MAX_NAMED_NODES).map(AsRef::as_ref).collect();
    let more = if names.len() > MAX_NAMED_NODES { ", …" } else { "" };
    format!("{}{more}", named.join(", "))
}
