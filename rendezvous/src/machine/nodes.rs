//! The agents that are there, and how many of them a round could have. What is asked at every event is counted as they come and go,
//! since thousands come one by one.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::Hello;

use super::Peer;

/// An agent that said hello.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) hello: Hello,
    /// Its rank in the last round that it was in, under whichever coordinator.
    pub(super) place: Option<u32>,
    /// Whether it was in the last round, on this connection.
    pub(super) is_member: bool,
    /// Whether it has no rank running and wants to be in the next round.
    pub(super) waits: bool,
    /// The last round that it was told the verdict on.
    pub(super) told: Option<u64>,
}

/// All agents that said hello.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    all: BTreeMap<Peer, Node>,
    /// Those that ask for a place, by place.
    asking: BTreeSet<(u32, Peer)>,
    /// The connection of each agent.
    agents: BTreeMap<u64, Peer>,
}

impl Nodes {
    pub(super) fn all(&self) -> &BTreeMap<Peer, Node> {
        &self.all
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Any of them: what all must say alike, this one said.
    pub(super) fn any(&self) -> Option<&Node> {
        self.all.values().next()
    }

    /// One that asks for a place.
    pub(super) fn asking(&self, place: u32) -> Option<&Node> {
        let (_, peer) = self.asking.range((place, 0)..=(place, Peer::MAX)).next()?;
        self.all.get(peer)
    }

    /// The connection of an agent.
    pub(super) fn of_agent(&self, agent: u64) -> Option<Peer> {
        self.agents.get(&agent).copied()
    }

    pub(super) fn get(&self, peer: Peer) -> Option<&Node> {
        self.all.get(&peer)
    }

    pub(super) fn get_mut(&mut self, peer: Peer) -> Option<&mut Node> {
        self.all.get_mut(&peer)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Peer, &mut Node)> {
        self.all.iter_mut().map(|(peer, node)| (*peer, node))
    }

    pub(super) fn insert(&mut self, peer: Peer, node: Node) {
        self.asking.extend(node.hello.node_rank.map(|place| (place, peer)));
        self.agents.insert(node.hello.agent, peer);
        self.all.insert(peer, node);
    }

    pub(super) fn remove(&mut self, peer: Peer) -> Option<Node> {
        let node = self.all.remove(&peer)?;
        self.agents.remove(&node.hello.agent);
        if let Some(place) = node.hello.node_rank {
            self.asking.remove(&(place, peer));
        }
        Some(node)
    }
}

/// Who waits for the next round, and who is waited for.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    /// How many wait that ask for no place.
    free: usize,
    /// How many wait for each place that is asked for.
    asked: BTreeMap<u32, usize>,
    /// Members of the last round that are here and do not wait yet.
    missing: BTreeSet<Peer>,
}

impl Gathering {
    pub(super) fn of(nodes: &Nodes) -> Self {
        let mut gathering = Self::default();
        nodes.all.iter().for_each(|(peer, node)| gathering.add(*peer, node));
        gathering
    }

    /// Counts a node that is here, as it is.
    pub(super) fn add(&mut self, peer: Peer, node: &Node) {
        match (node.waits, node.hello.node_rank) {
            (true, None) => self.free += 1,
            (true, Some(place)) => *self.asked.entry(place).or_default() += 1,
            (false, _) if node.place.is_some() => _ = self.missing.insert(peer),
            (false, _) => {}
        }
    }

    /// Counts it no more: it goes, or is about to change.
    pub(super) fn remove(&mut self, peer: Peer, node: &Node) {
        match (node.waits, node.hello.node_rank) {
            (true, None) => self.free -= 1,
            (true, Some(place)) => {
                if let Some(count) = self.asked.get_mut(&place) {
                    *count -= 1;
                    if *count == 0 {
                        self.asked.remove(&place);
                    }
                }
            }
            (false, _) => _ = self.missing.remove(&peer),
        }
    }

    /// How many of those that wait one round could have: of two that ask for one place, one.
    pub(super) fn count(&self) -> usize {
        self.free + self.asked.len()
    }

    pub(super) fn is_anybody_missing(&self) -> bool {
        !self.missing.is_empty()
    }
}
