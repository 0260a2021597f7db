//! What ends a round, or the job.

use std::time::Duration;

use ice_proto::rendezvous::ToAgent;

use super::super::nodes::Gathering;
use super::super::record::{Ending, Judged};
use super::super::restarts::{Failure, Verdict};
use super::{Action, Coordinator, Joining, Peer, Phase, host};

/// Nodes that a message names; it goes to all of them.
const NAMED: usize = 32;

/// How a node has gone.
pub(super) enum Gone {
    Lost,
    /// Its agent has another connection.
    Replaced,
    Left {
        reason: String,
        preempted: bool,
    },
}

impl Coordinator {
    /// Judges a failure, unless that of its round or of a later one was judged before. Whoever failed may have lost its coordinator, or
    /// its connection, with its report on the way; it reports again where it comes back, and its round is over by then.
    pub(super) fn failed(&mut self, now: Duration, peer: Peer, round: u64, failure: Failure) -> Vec<Action> {
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
                let mut actions = self.next_round(now, after, &said, false);
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
            let broken = ToAgent::RoundBroken { round: *round, reason: said.clone(), gentle: false };
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

    /// A node is lost or leaves. An elastic job goes on with the others, or waits for more. One of a fixed size waits for a lost node
    /// to come back where restarts are allowed.
    pub(super) fn gone(&mut self, now: Duration, peer: Peer, how: Gone) -> Vec<Action> {
        let who = self.describe(peer);
        let Some(node) = self.nodes.remove(peer) else { return Vec::new() };
        let (fewest, most) = node.hello.nnodes;
        let told_to = matches!(how, Gone::Left { .. });
        let preempted = matches!(how, Gone::Left { preempted: true, .. });
        let goes_on = fewest < most || (!told_to && node.hello.restarts.max_restarts > 0);
        let reason = match how {
            Gone::Lost => format!("lost {who}: its agent is gone"),
            Gone::Replaced => format!("lost {who}: its agent has come back"),
            Gone::Left { reason, .. } => format!("{who} left: {reason}"),
        };
        match &mut self.phase {
            Phase::Closed(_) => Vec::new(),
            // One that had finished is not missed, nor one that only waited.
            Phase::Running { members, finished, .. }
                if !members.contains(&peer) || finished.contains(&peer) =>
            {
                Vec::new()
            }
            Phase::Joining(joining) if self.round == 0 || node.place.is_none() || goes_on => {
                joining.gathering.remove(peer, &node);
                joining.preempted |= preempted;
                self.start_if_due(now)
            }
            // What the others have finished cannot be done again.
            Phase::Running { finished, .. } if goes_on && finished.is_empty() => {
                let left = self.nodes.len();
                let note = match left >= fewest as usize {
                    true => {
                        format!("{reason}; going on with {left} {}", if left == 1 { "node" } else { "nodes" })
                    }
                    false => format!("{reason}; waiting for another node, since {fewest} are needed"),
                };
                let actions = self.next_round(now, Duration::ZERO, &note, false);
                if let Phase::Joining(joining) = &mut self.phase {
                    joining.preempted = preempted;
                }
                actions
            }
            _ => self.close(Ending { success: false, reason, no_restart: None, preempted }),
        }
    }

    /// Ends the round for its members. Those that wait for a place are in already; one that has only said hello may have ranks that end.
    pub(super) fn next_round(
        &mut self,
        now: Duration,
        pause: Duration,
        reason: &str,
        gentle: bool,
    ) -> Vec<Action> {
        let Phase::Running { members, .. } = &self.phase else { return Vec::new() };
        let message = ToAgent::RoundBroken { round: self.round, reason: reason.to_owned(), gentle };
        let there = members.iter().filter(|peer| self.nodes.get(**peer).is_some());
        let mut actions: Vec<_> = there.map(|peer| Action::Send(*peer, message.clone())).collect();
        self.round += 1;
        let gathering = Gathering::of(&self.nodes);
        self.phase =
            Phase::Joining(Joining { since: now, not_before: now + pause, gathering, ..Joining::default() });
        actions.extend(self.start_if_due(now));
        actions
    }

    /// Too few have come in time. Where one of those that are missed was preempted, the job is to be started again.
    pub(super) fn give_up(&mut self) -> Vec<Action> {
        let preempted = matches!(&self.phase, Phase::Joining(joining) if joining.preempted);
        let (fewest, most) = self.nodes.any().map_or((0, 0), |node| node.hello.nnodes);
        let wanted = if fewest == most { most.to_string() } else { format!("at least {fewest}") };
        let there: Vec<String> =
            self.nodes.all().values().filter(|node| node.waits).map(|node| host(&node.hello)).collect();
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
        self.close(Ending { success: false, reason, no_restart: None, preempted })
    }

    fn end(&mut self, success: bool, reason: String, no_restart: Option<String>) -> Vec<Action> {
        self.close(Ending { success, reason, no_restart, preempted: false })
    }

    fn close(&mut self, ending: Ending) -> Vec<Action> {
        if self.is_closed() {
            return Vec::new();
        }
        self.round += u64::from(matches!(self.phase, Phase::Running { .. }));
        self.phase = Phase::Closed(ending);
        let Some(closed) = self.last_word() else { return Vec::new() };
        self.nodes.all().keys().map(|peer| Action::Send(*peer, closed.clone())).collect()
    }

    /// What agents are told once the job is over.
    pub(super) fn last_word(&self) -> Option<ToAgent> {
        let Phase::Closed(ending) = &self.phase else { return None };
        let Ending { success, reason, no_restart, preempted } = ending.clone();
        Some(ToAgent::Closed { success, reason, no_restart, preempted })
    }
}

/// The first of them.
fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let named: Vec<&str> = names.iter().take(NAMED).map(AsRef::as_ref).collect();
    let more = if names.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", named.join(", "))
}
