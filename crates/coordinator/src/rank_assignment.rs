//! Selection of the members of a round, and their node ranks.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::{Hello, NodeAssignment, RanksStore};

use crate::nodes::{Node, Peer};

/// Selects up to `max_nodes` members of a round: members of the last round first, then nodes that
/// were in an earlier one, each in order of arrival.
pub(super) fn select_members(nodes: &BTreeMap<Peer, Node>, max_nodes: usize) -> Vec<Peer> {
    let mut candidates: Vec<Peer> =
        nodes.iter().filter(|(_, node)| node.is_waiting).map(|(peer, _)| *peer).collect();
    candidates.sort_by_key(|peer| (!nodes[peer].is_member, nodes[peer].last_node_rank.is_none(), *peer));
    // Of two nodes that request one rank, the second waits.
    let mut asked = BTreeSet::new();
    candidates.retain(|peer| nodes[peer].hello.node_rank.is_none_or(|rank| asked.insert(rank)));
    candidates.truncate(max_nodes);
    candidates
}

/// Orders the members by node rank. A member gets the rank that it requests, or else the one that
/// it had, if that is free and within the round. The remaining members fill the gaps in the same
/// order.
pub(super) fn assign_node_ranks(nodes: &BTreeMap<Peer, Node>, members: &[Peer]) -> Vec<Peer> {
    let mut by_rank: Vec<Option<Peer>> = vec![None; members.len()];
    let wish = |peer: &Peer| nodes[peer].hello.node_rank.or(nodes[peer].last_node_rank).unwrap_or(u32::MAX);
    let mut rest: Vec<Peer> = Vec::new();
    let mut in_order = members.to_vec();
    in_order.sort_by_key(|peer| (nodes[peer].hello.node_rank.is_none(), wish(peer), *peer));
    for peer in in_order {
        match by_rank.get_mut(wish(&peer) as usize) {
            Some(slot @ None) => *slot = Some(peer),
            _ => rest.push(peer),
        }
    }
    let mut rest = rest.into_iter();
    by_rank.into_iter().filter_map(|peer| peer.or_else(|| rest.next())).collect()
}

/// Returns the assignment of each member, given in order of their node ranks.
pub(super) fn assignments<'a>(nodes: &'a BTreeMap<Peer, Node>, by_rank: &[Peer]) -> Vec<NodeAssignment> {
    let mut ranks_on_host: BTreeMap<&str, u32> = BTreeMap::new();
    let mut ranks_of_role: BTreeMap<&str, u32> = BTreeMap::new();
    let members = || by_rank.iter().map(|peer| &nodes[peer].hello);
    for hello in members() {
        *ranks_on_host.entry(&hello.host).or_default() += hello.local_world_size;
        *ranks_of_role.entry(&hello.role).or_default() += hello.local_world_size;
    }
    let mut next_of_role: BTreeMap<&str, u32> = BTreeMap::new();
    let mut first_rank = 0;
    let part = |(group_rank, hello): (u32, &'a Hello)| {
        let local_world_size = hello.local_world_size;
        let ranks_on_host = ranks_on_host.get(hello.host.as_str()).copied().unwrap_or(local_world_size);
        let role_world_size = ranks_of_role.get(hello.role.as_str()).copied().unwrap_or(local_world_size);
        let next_of_role = next_of_role.entry(hello.role.as_str()).or_default();
        let first_role_rank = *next_of_role;
        let member = NodeAssignment {
            group_rank,
            first_rank,
            local_world_size,
            ranks_on_host,
            first_role_rank,
            role_world_size,
        };
        first_rank += local_world_size;
        *next_of_role += local_world_size;
        member
    };
    (0..).zip(members()).map(part).collect()
}

/// Returns the address of the ranks' store if it is not the endpoint. A store that rank 0 serves is
/// on the first node. Otherwise the agent at the endpoint may name another of its addresses.
pub(super) fn ranks_store(nodes: &BTreeMap<Peer, Node>, by_rank: &[Peer]) -> Option<RanksStore> {
    let mut named = by_rank.iter().map(|peer| nodes[peer].hello.ranks_store.as_ref());
    match named.next()? {
        Some(first) => Some(first.clone()),
        None => named.flatten().find(|store| !store.by_rank).cloned(),
    }
}
