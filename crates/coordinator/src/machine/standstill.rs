//! Detection of a round in which all nodes wait for each other.
//!
//! An agent sees its own ranks only. Ranks that get nothing done may wait for a rank of another
//! node that saves or loads data, so their agent reports that they wait instead of ending them. The
//! coordinator decides: if no node of the round works, the round hangs.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::{Achieved, NodeProgress, ToAgent};

use super::{Action, Coordinator, Peer, Phase};

/// The nodes of a round that do not work. Disjoint from the nodes that have finished.
#[derive(Default)]
pub(super) struct Standstill {
    /// All of these nodes, with the progress of those that wait; `None` for a node that rests.
    idle: BTreeMap<Peer, Option<Achieved>>,
    /// The nodes that wait, furthest behind first. At the end of a large job every node reports,
    /// and each report needs the first.
    waiting: BTreeSet<(Achieved, Peer)>,
}

impl Standstill {
    /// Forgets a node that works or has finished.
    pub(super) fn remove(&mut self, peer: Peer) {
        if let Some(Some(achieved)) = self.idle.remove(&peer) {
            self.waiting.remove(&(achieved, peer));
        }
    }

    fn set(&mut self, peer: Peer, progress: NodeProgress) {
        self.remove(peer);
        match progress {
            NodeProgress::Working => {}
            NodeProgress::Resting => _ = self.idle.insert(peer, None),
            NodeProgress::Waiting(achieved) => {
                self.idle.insert(peer, Some(achieved));
                self.waiting.insert((achieved, peer));
            }
        }
    }
}

impl Coordinator {
    /// Notes the progress of a node of the current round.
    pub(super) fn progress(&mut self, peer: Peer, round: u64, progress: NodeProgress) -> Vec<Action> {
        if round != self.round || !self.is_member(peer) {
            return Vec::new();
        }
        let Phase::Running { finished, standstill, .. } = &mut self.phase else { return Vec::new() };
        if finished.contains(&peer) {
            return Vec::new();
        }
        standstill.set(peer, progress);
        self.check_standstill()
    }

    /// Notifies one agent if no node of the round works and at least one waits. Its failure ends
    /// the round for all; a failure of each node would blame ranks that only wait for it.
    pub(super) fn check_standstill(&self) -> Vec<Action> {
        let Phase::Running { members, finished, standstill } = &self.phase else { return Vec::new() };
        if standstill.idle.len() + finished.len() < members.len() {
            return Vec::new();
        }
        let behind = standstill.waiting.first();
        behind
            .map(|(_, peer)| Action::Send(*peer, ToAgent::Standstill { round: self.round }))
            .into_iter()
            .collect()
    }
}
