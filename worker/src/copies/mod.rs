//! Copies of what a rank alone has of a state, in the memory of another rank.
//!
//! A [`Shelf`] holds them, those of the rank itself among them, and outlives rounds. In a round, an [`Exchange`] brings each rank's to the rank that
//! holds it, over a connection of their own and in threads, since the process group is busy with training.
//!
//! In the book: `docs/elasticity.md#sharded-optimizers`.

mod exchange;
mod receive;
mod shelf;
#[cfg(test)]
mod tests;

pub use exchange::Exchange;
pub use shelf::{Parcel, Shelf};

/// For each rank the one that holds its copies, given the node that each is on: a rank of the next node where there are several, and the next
/// rank otherwise; itself where it is alone. What the ranks of a node hold differs by one owner at most where nodes are of equal size.
pub fn holders(nodes: &[u32]) -> Vec<usize> {
    let mut places: Vec<u32> = nodes.to_vec();
    places.sort_unstable();
    places.dedup();
    let on = |node: u32| (0..nodes.len()).filter(move |&rank| nodes[rank] == node).collect::<Vec<_>>();
    let holder = |(rank, node): (usize, &u32)| {
        if places.len() < 2 {
            return (rank + 1) % nodes.len();
        }
        let place = places.iter().position(|other| other == node).unwrap_or(0);
        let next = on(places[(place + 1) % places.len()]);
        let index = on(*node).iter().position(|&other| other == rank).unwrap_or(0);
        next[index % next.len()]
    };
    nodes.iter().enumerate().map(holder).collect()
}
