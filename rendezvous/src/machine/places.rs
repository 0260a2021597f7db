//! Which nodes are in a round, and which place each has.

use std::collections::{BTreeMap, BTreeSet};

use super::Peer;
use super::coordinator::Node;

/// The members of a round, at most so many: those of the last one first, then in order of arrival.
pub(super) fn choose(nodes: &BTreeMap<Peer, Node>, joined: &BTreeSet<Peer>, most: usize) -> Vec<Peer> {
    let mut candidates: Vec<Peer> = nodes.keys().copied().filter(|peer| joined.contains(peer)).collect();
    candidates.sort_by_key(|peer| (nodes[peer].place.is_none(), *peer));
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
