//! The choice of the state that a round continues from, if every rank has a shard that no other
//! rank has.
//!
//! Each rank receives the inventories of all ranks, so that all ranks choose alike.

use serde::{Deserialize, Serialize};

/// A rank's inventory of shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RankInventory {
    /// Index of the rank's node.
    pub(super) node: u32,
    /// The rank's shard of the state in use when the last round ended. `None` if the rank was in no
    /// round, or if an update was interrupted that cannot be undone.
    pub(super) live: Option<LiveShard>,
    /// Replicas in the rank's memory: of its own shard and of shards of other ranks.
    pub(super) copies: Vec<ReplicaId>,
    /// Number of the next replica, as far as the rank knows.
    pub(super) next: u64,
}

/// A shard of the state in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LiveShard {
    /// Value of the progress counter: shards with equal positions belong to the same state.
    pub(super) position: u64,
    pub(super) owner: usize,
    pub(super) of: usize,
}

/// A replica of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReplicaId {
    pub(super) number: u64,
    pub(super) step: u64,
    pub(super) owner: usize,
    pub(super) of: usize,
}

/// The state that a round continues from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RecoverySource {
    /// There was no round before, so no rank has a state.
    Nothing,
    /// All ranks have kept their numbers and their shards.
    AsItWas,
    /// All shards of the state in use are left. Holds, by owner, the rank that has each shard now.
    LiveShard(Vec<usize>),
    /// Shards are lost. This is the newest replica of which every shard is left.
    Copied {
        number: u64,
        step: u64,
        /// The rank that has each shard now, by owner.
        suppliers: Vec<usize>,
    },
    /// Shards are lost, and there is no complete replica.
    Lost,
}

/// Returns the state that the ranks can continue from, and the number of the newest complete
/// replica. `offers` are in order of rank.
pub(super) fn find(offers: &[RankInventory]) -> (RecoverySource, Option<u64>) {
    let copy = newest_copy(offers);
    let whole = copy.as_ref().map(|(copy, _)| copy.number);
    if let Some(suppliers) = live(offers) {
        let stays = |(rank, offer): (usize, &RankInventory)| {
            offer.live.is_some_and(|live| (live.owner, live.of) == (rank, offers.len()))
        };
        let same = offers.iter().enumerate().all(stays);
        return (if same { RecoverySource::AsItWas } else { RecoverySource::LiveShard(suppliers) }, whole);
    }
    let found = match copy {
        Some((ReplicaId { number, step, .. }, suppliers)) => {
            RecoverySource::Copied { number, step, suppliers }
        }
        None if offers.iter().all(|offer| offer.next == 0) => RecoverySource::Nothing,
        None => RecoverySource::Lost,
    };
    (found, whole)
}

/// Returns the ranks that have the shards of the newest state in use, or `None` if a shard is
/// missing. A shard with a smaller position belongs to an older state.
fn live(offers: &[RankInventory]) -> Option<Vec<usize>> {
    let newest = offers.iter().filter_map(|offer| offer.live).max_by_key(|live| live.position)?;
    let has = |owner: usize| {
        let live = LiveShard { owner, ..newest };
        offers.iter().position(|offer| offer.live == Some(live))
    };
    (0..newest.of).map(has).collect()
}

/// Returns the newest replica of which all shards are left, and the rank that supplies each shard:
/// its owner if that rank still has it, else the first rank that does.
fn newest_copy(offers: &[RankInventory]) -> Option<(ReplicaId, Vec<usize>)> {
    let mut copies: Vec<ReplicaId> = offers.iter().flat_map(|offer| offer.copies.iter().copied()).collect();
    copies.sort_unstable_by_key(|copy| std::cmp::Reverse(copy.number));
    copies.dedup_by_key(|copy| copy.number);
    copies.into_iter().find_map(|copy| {
        let has = |owner: usize| {
            let wanted = |offer: &RankInventory| offer.copies.contains(&ReplicaId { owner, ..copy });
            let itself = Some(owner).filter(|&rank| offers.get(rank).is_some_and(wanted));
            itself.or_else(|| offers.iter().position(wanted))
        };
        let suppliers = (0..copy.of).map(has).collect::<Option<Vec<_>>>()?;
        Some((copy, suppliers))
    })
}

#[cfg(test)]
mod tests {
    use ice_worker::replica::assign_buddies;
    use proptest::prelude::*;

    use super::*;

    fn offer(
        node: u32,
        live: Option<(u64, usize, usize)>,
        copies: &[(u64, usize)],
        of: usize,
    ) -> RankInventory {
        let live = live.map(|(position, owner, of)| LiveShard { position, owner, of });
        let copy = |&(number, owner): &(u64, usize)| ReplicaId { number, step: 10 * number, owner, of };
        RankInventory { node, live, copies: copies.iter().map(copy).collect(), next: 9 }
    }

    #[test]
    fn what_is_in_use_goes_before_copies_where_nothing_of_it_is_lost() {
        let new = RankInventory { node: 0, live: None, copies: Vec::new(), next: 0 };
        assert_eq!(find(&[new.clone(), new.clone()]), (RecoverySource::Nothing, None));
        let a = offer(0, Some((7, 0, 2)), &[(3, 0), (3, 1)], 2);
        let b = offer(0, Some((7, 1, 2)), &[(3, 1), (3, 0)], 2);
        assert_eq!(find(&[a.clone(), b.clone()]), (RecoverySource::AsItWas, Some(3)));
        assert_eq!(find(&[b.clone(), a.clone()]), (RecoverySource::LiveShard(vec![1, 0]), Some(3)));
        assert_eq!(
            find(&[a.clone(), new.clone(), b.clone()]),
            (RecoverySource::LiveShard(vec![0, 2]), Some(3))
        );
        let copied = RecoverySource::Copied { number: 3, step: 30, suppliers: vec![0, 0] };
        assert_eq!(find(&[a.clone(), new.clone()]), (copied, Some(3)), "the other part is lost");
        let ahead = offer(0, Some((8, 1, 2)), &[(3, 1), (3, 0)], 2);
        let copied = RecoverySource::Copied { number: 3, step: 30, suppliers: vec![0, 1] };
        assert_eq!(find(&[a.clone(), ahead]), (copied, Some(3)), "one has done a step more");
        let torn = offer(0, None, &[(3, 1), (4, 1)], 2);
        let copied = RecoverySource::Copied { number: 3, step: 30, suppliers: vec![0, 1] };
        assert_eq!(find(&[a, torn]), (copied, Some(3)), "no rank has rank 0's part of copy 4");
        let alone = offer(0, Some((7, 1, 2)), &[(4, 1)], 2);
        assert_eq!(find(&[alone, new]), (RecoverySource::Lost, None));
    }

    proptest! {
        /// If no rank is lost together with the holder of its replica, no shard is lost.
        #[test]
        fn a_copy_survives_its_owner_or_its_holder(
            nodes in prop::collection::vec(0_u32..3, 2..9),
            lost in prop::collection::vec(any::<bool>(), 9),
            order in Just((0..9_usize).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let n = nodes.len();
            let holders = assign_buddies(&nodes);
            let offers: Vec<_> = (0..n).map(|rank| {
                let copies: Vec<_> =
                    (0..n).filter(|&owner| owner == rank || holders[owner] == rank).map(|owner| (5, owner)).collect();
                match lost[rank] {
                    true => RankInventory { node: nodes[rank], live: None, copies: Vec::new(), next: 0 },
                    false => offer(nodes[rank], Some((1, rank, n)), &copies, n),
                }
            }).collect();
            let offers: Vec<_> = order.iter().filter(|&&rank| rank < n).map(|&rank| offers[rank].clone()).collect();
            let survives = (0..n).all(|rank| !lost[rank] || !lost[holders[rank]]);
            match find(&offers) {
                (RecoverySource::Copied { number: 5, suppliers, .. }, Some(5)) => {
                    prop_assert!(survives && lost[..n].contains(&true));
                    for (owner, &rank) in suppliers.iter().enumerate() {
                        prop_assert!(offers[rank].copies.iter().any(|copy| copy.owner == owner));
                    }
                }
                (RecoverySource::AsItWas | RecoverySource::LiveShard(_), Some(5)) => prop_assert!(!lost[..n].contains(&true)),
                (found, whole) => prop_assert!(!survives && whole.is_none(), "{found:?} {whole:?}"),
            }
        }
    }
}
