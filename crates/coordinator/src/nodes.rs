//! The connected agents, and the number of nodes that a round could have. Thousands of agents join
//! one by one, so the counts that every event needs are kept and not recomputed.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::Hello;

/// A connection of an agent. Connections are numbered in order of arrival.
pub type Peer = u64;

/// An agent that has said hello.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) hello: Hello,
    /// Its rank in the last round that it was in, under any coordinator.
    pub(super) last_node_rank: Option<u32>,
    /// Whether this connection was in the last round.
    pub(super) is_member: bool,
    /// Whether it has joined: no rank of it runs, and it waits for the next round.
    pub(super) is_waiting: bool,
    /// The last round whose verdict it has received.
    pub(super) notified: Option<u64>,
}

/// All agents that have said hello.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    all: BTreeMap<Peer, Node>,
    /// Nodes that request a node rank, by that rank.
    requesting: BTreeSet<(u32, Peer)>,
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

    /// Returns any node, for values that admission makes equal on all.
    pub(super) fn any(&self) -> Option<&Node> {
        self.all.values().next()
    }

    /// Returns a node that requests this node rank.
    pub(super) fn requesting(&self, node_rank: u32) -> Option<&Node> {
        let (_, peer) = self.requesting.range((node_rank, 0)..=(node_rank, Peer::MAX)).next()?;
        self.all.get(peer)
    }

    /// The connection of each agent, by the agent's number.
    pub(super) fn by_agent_id(&self, agent_id: u64) -> Option<Peer> {
        self.agents.get(&agent_id).copied()
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
        self.requesting.extend(node.hello.node_rank.map(|node_rank| (node_rank, peer)));
        self.agents.insert(node.hello.agent_id, peer);
        self.all.insert(peer, node);
    }

    pub(super) fn remove(&mut self, peer: Peer) -> Option<Node> {
        let node = self.all.remove(&peer)?;
        self.agents.remove(&node.hello.agent_id);
        if let Some(node_rank) = node.hello.node_rank {
            self.requesting.remove(&(node_rank, peer));
        }
        Some(node)
    }
}

/// The nodes that wait for the next round, and the members of the last one that have not joined
/// yet.
#[derive(Debug, Default)]
pub(super) struct Lobby {
    /// Number of waiting nodes that request no rank.
    free: usize,
    /// Number of waiting nodes per requested rank.
    asked: BTreeMap<u32, usize>,
    /// Connected members of the last round that do not wait yet.
    missing: BTreeSet<Peer>,
}

impl Lobby {
    pub(super) fn of(nodes: &Nodes) -> Self {
        let mut lobby = Self::default();
        nodes.all.iter().for_each(|(peer, node)| lobby.add(*peer, node));
        lobby
    }

    /// Counts a node in its present state.
    pub(super) fn add(&mut self, peer: Peer, node: &Node) {
        match (node.is_waiting, node.hello.node_rank) {
            (true, None) => self.free += 1,
            (true, Some(node_rank)) => *self.asked.entry(node_rank).or_default() += 1,
            (false, _) if node.last_node_rank.is_some() => _ = self.missing.insert(peer),
            (false, _) => {}
        }
    }

    /// Uncounts a node before it changes or goes.
    pub(super) fn remove(&mut self, peer: Peer, node: &Node) {
        match (node.is_waiting, node.hello.node_rank) {
            (true, None) => self.free -= 1,
            (true, Some(node_rank)) => {
                if let Some(count) = self.asked.get_mut(&node_rank) {
                    *count -= 1;
                    if *count == 0 {
                        self.asked.remove(&node_rank);
                    }
                }
            }
            (false, _) => _ = self.missing.remove(&peer),
        }
    }

    /// Returns how many of the waiting nodes one round can have. Nodes that request the same rank
    /// count once.
    pub(super) fn count(&self) -> usize {
        self.free + self.asked.len()
    }

    pub(super) fn has_missing_members(&self) -> bool {
        !self.missing.is_empty()
    }
}

/// Returns the name of an agent's host for messages, with the address that it connected from, since
/// hosts may share a name. A loopback address is left out.
pub(super) fn host_label(hello: &Hello) -> String {
    match hello.addresses.first().filter(|address| !address.is_loopback()) {
        Some(address) => format!("{} at {address}", hello.host),
        None => hello.host.clone(),
    }
}
