//! Which state a round goes on with, where each rank has a part of it that no other has.
//!
//! All ranks know what each of them has, and decide alike.

use serde::{Deserialize, Serialize};

/// What a rank has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    /// The node that it is on.
    pub(super) node: u32,
    /// Its part of the state that it was in when the last round ended; none where it was in no round, or within an update that cannot be undone.
    pub(super) live: Option<Live>,
    /// Copies in its memory, its own and others'.
    pub(super) copies: Vec<Copy>,
    /// The number of the next copy, as far as it knows.
    pub(super) next: u64,
}

/// A part of a state that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Live {
    /// Things done that all ranks do: parts of equal positions are of the same state.
    pub(super) position: u64,
    pub(super) owner: usize,
    pub(super) of: usize,
}

/// A copy of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Copy {
    pub(super) number: u64,
    pub(super) step: u64,
    pub(super) owner: usize,
    pub(super) of: usize,
}

/// What a round goes on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// There has been no round before: nobody has anything.
    Nothing,
    /// All ranks are what they were, and have what they had.
    AsItWas,
    /// All parts of the state that was in use are there: by owner, the ranks that have them now.
    Live(Vec<usize>),
    /// Parts are lost, and the newest copy of which none is lost is this.
    Copied {
        number: u64,
        step: u64,
        /// By owner, the ranks that have them now.
        suppliers: Vec<usize>,
    },
    /// Parts are lost, and there is no copy.
    Lost,
}

/// What the ranks can go on with, and the number of the newest whole copy; offers are in order of rank.
pub(super) fn find(offers: &[Offer]) -> (Found, Option<u64>) {
    let copy = newest_copy(offers);
    let whole = copy.as_ref().map(|(copy, _)| copy.number);
    if let Some(suppliers) = live(offers) {
        let stays = |(rank, offer): (usize, &Offer)| {
            offer.live.is_some_and(|live| (live.owner, live.of) == (rank, offers.len()))
        };
        let same = offers.iter().enumerate().all(stays);
        return (if same { Found::AsItWas } else { Found::Live(suppliers) }, whole);
    }
    let found = match copy {
        Some((Copy { number, step, .. }, suppliers)) => Found::Copied { number, step, suppliers },
        None if offers.iter().all(|offer| offer.next == 0) => Found::Nothing,
        None => Found::Lost,
    };
    (found, whole)
}

/// Who has the parts of the newest state in use, where none is missing. A part that is behind is of another state.
fn live(offers: &[Offer]) -> Option<Vec<usize>> {
    let newest = offers.iter().filter_map(|offer| offer.live).max_by_key(|live| live.position)?;
    let has = |owner: usize| {
        let live = Live { owner, ..newest };
        offers.iter().position(|offer| offer.live == Some(live))
    };
    (0..newest.of).map(has).collect()
}

/// The newest copy of which all parts are there, and who has them: their owners, where they are still what they were.
fn newest_copy(offers: &[Offer]) -> Option<(Copy, Vec<usize>)> {
    let mut copies: Vec<Copy> = offers.iter().flat_map(|offer| offer.copies.iter().copied()).collect();
    copies.sort_unstable_by_key(|copy| std::cmp::Reverse(copy.number));
    copies.dedup_by_key(|copy| copy.number);
    copies.into_iter().find_map(|copy| {
        let has = |owner: usize| {
            let wanted = |offer: &Offer| offer.copies.contains(&Copy { owner, ..copy });
            let itself = Some(owner).filter(|&rank| offers.get(rank).is_some_and(wanted));
            itself.or_else(|| offers.iter().position(wanted))
        };
        let suppliers = (0..copy.of).map(has).collect::<Option<Vec<_>>>()?;
        Some((copy, suppliers))
    })
}

#[cfg(test)]
mod tests {
    use ice_worker::copies::holders;
    use proptest::prelude::*;

    use super::*;

    fn offer(node: u32, live: Option<(u64, usize, usize)>, copies: &[(u64, usize)], of: usize) -> Offer {
        let live = live.map(|(position, owner, of)| Live { position, owner, of });
        let copy = |&(number, owner): &(u64, usize)| Copy { number, step: 10 * number, owner, of };
        Offer { node, live, copies: copies.iter().map(copy).collect(), next: 9 }
    }

    #[test]
    fn what_is_in_use_goes_before_copies_where_nothing_of_it_is_lost() {
        let new = Offer { node: 0, live: None, copies: Vec::new(), next: 0 };
        assert_eq!(find(&[new.clone(), new.clone()]), (Found::Nothing, None));
        let a = offer(0, Some((7, 0, 2)), &[(3, 0), (3, 1)], 2);
        let b = offer(0, Some((7, 1, 2)), &[(3, 1), (3, 0)], 2);
        assert_eq!(find(&[a.clone(), b.clone()]), (Found::AsItWas, Some(3)));
        assert_eq!(find(&[b.clone(), a.clone()]), (Found::Live(vec![1, 0]), Some(3)));
        assert_eq!(find(&[a.clone(), new.clone(), b.clone()]), (Found::Live(vec![0, 2]), Some(3)));
        let copied = Found::Copied { number: 3, step: 30, suppliers: vec![0, 0] };
        assert_eq!(find(&[a.clone(), new.clone()]), (copied, Some(3)), "the other part is lost");
        let ahead = offer(0, Some((8, 1, 2)), &[(3, 1), (3, 0)], 2);
        let copied = Found::Copied { number: 3, step: 30, suppliers: vec![0, 1] };
        assert_eq!(find(&[a.clone(), ahead]), (copied, Some(3)), "one has done a step more");
        let torn = offer(0, None, &[(3, 1), (4, 1)], 2);
        let copied = Found::Copied { number: 3, step: 30, suppliers: vec![0, 1] };
        assert_eq!(find(&[a, torn]), (copied, Some(3)), "nobody has rank 0's part of copy 4");
        let alone = offer(0, Some((7, 1, 2)), &[(4, 1)], 2);
        assert_eq!(find(&[alone, new]), (Found::Lost, None));
    }

    proptest! {
        /// As long as of no rank both it and its holder are lost, no part is.
        #[test]
        fn a_copy_survives_its_owner_or_its_holder(
            nodes in prop::collection::vec(0_u32..3, 2..9),
            lost in prop::collection::vec(any::<bool>(), 9),
            order in Just((0..9_usize).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let n = nodes.len();
            let holders = holders(&nodes);
            let offers: Vec<_> = (0..n).map(|rank| {
                let copies: Vec<_> =
                    (0..n).filter(|&owner| owner == rank || holders[owner] == rank).map(|owner| (5, owner)).collect();
                match lost[rank] {
                    true => Offer { node: nodes[rank], live: None, copies: Vec::new(), next: 0 },
                    false => offer(nodes[rank], Some((1, rank, n)), &copies, n),
                }
            }).collect();
            let offers: Vec<_> = order.iter().filter(|&&rank| rank < n).map(|&rank| offers[rank].clone()).collect();
            let survives = (0..n).all(|rank| !lost[rank] || !lost[holders[rank]]);
            match find(&offers) {
                (Found::Copied { number: 5, suppliers, .. }, Some(5)) => {
                    prop_assert!(survives && lost[..n].contains(&true));
                    for (owner, &rank) in suppliers.iter().enumerate() {
                        prop_assert!(offers[rank].copies.iter().any(|copy| copy.owner == owner));
                    }
                }
                (Found::AsItWas | Found::Live(_), Some(5)) => prop_assert!(!lost[..n].contains(&true)),
                (found, whole) => prop_assert!(!survives && whole.is_none(), "{found:?} {whole:?}"),
            }
        }
    }
}
