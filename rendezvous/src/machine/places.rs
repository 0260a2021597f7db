//! Which nodes are in a round, and which place each has.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::{Hello, Member, RanksStore};

use super::Peer;
use super::nodes::Node;

/// The members of a round, at most so many: those of the last one first, then those that were in an earlier one, in order of arrival.
pub(super) fn choose(nodes: &BTreeMap<Peer, Node>, most: usize) -> Vec<Peer> {
    let mut candidates: Vec<Peer> =
        nodes.iter().filter(|(_, node)| node.waits).map(|(peer, _)| *peer).collect();
    candidates.sort_by_key(|peer| (!nodes[peer].is_member, nodes[peer].place.is_none(), *peer));
    // Of two that ask for one place, the second waits.
    let mut asked = BTreeSet::new();
    candidates.retain(|peer| nodes[peer].hello.node_rank.is_none_or(|rank| asked.insert(rank)));
    candidates.truncate(most);
    candidates
}

/// The members in order of their group rank. Each has the place that it asked for, or else had, where that is free and there is such a
/// place; the others fill the gaps, in the same order.
pub(super) fn arrange(nodes: &BTreeMap<Peer, Node>, members: &[Peer]) -> Vec<Peer> {
    let mut places: Vec<Option<Peer>> = vec![None; members.len()];
    let wish = |peer: &Peer| nodes[peer].hello.node_rank.or(nodes[peer].place).unwrap_or(u32::MAX);
    let mut rest: Vec<Peer> = Vec::new();
    let mut in_order = members.to_vec();
    in_order.sort_by_key(|peer| (nodes[peer].hello.node_rank.is_none(), wish(peer), *peer));
    for peer in in_order {
        match places.get_mut(wish(&peer) as usize) {
            Some(place @ None) => *place = Some(peer),
            _ => rest.push(peer),
        }
    }
    let mut rest = rest.into_iter();
    places.into_iter().filter_map(|place| place.or_else(|| rest.next())).collect()
}

/// The part of each member of a round, given in order of their group rank.
pub(super) fn parts<'a>(nodes: &'a BTreeMap<Peer, Node>, places: &[Peer]) -> Vec<Member> {
    let mut ranks_on_host: BTreeMap<&str, u32> = BTreeMap::new();
    let mut ranks_of_role: BTreeMap<&str, u32> = BTreeMap::new();
    let members = || places.iter().map(|peer| &nodes[peer].hello);
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
        let member = Member {
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

/// Where the ranks of a round find their store, if not at the endpoint. A store that rank 0 serves
/// is on the first node. Otherwise the agent that has the endpoint may name another of its addresses.
pub(super) fn ranks_store(nodes: &BTreeMap<Peer, Node>, places: &[Peer]) -> Option<RanksStore> {
    let mut named = places.iter().map(|peer| nodes[peer].hello.ranks_store.as_ref());
    match named.next()? {
        Some(first) => Some(first.clone()),
        None => named.flatten().find(|store| !store.by_rank).cloned(),
    }
}
