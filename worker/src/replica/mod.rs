//! Replicas of a rank's own shards in the memory of another rank.
//!
//! A [`ReplicaStore`] holds replicas, including those of the rank itself, and outlives rounds. In a
//! round, a [`Replication`] sends the replicas of each rank to its holder, over connections and
//! threads of its own, since the process group is busy with training.
//!
//! In the book: `docs/elasticity.md#sharded-optimizers`.

mod endpoint;
mod replication;
mod server;
mod sockets;
mod store;
#[cfg(test)]
mod tests;

pub use replication::Replication;
pub use store::{ReplicaStore, ShardReplica};

/// Returns the holder of each rank's replicas, given the node of each rank: a rank of the next node
/// if there are several nodes, otherwise the next rank, or the rank itself if it is the only one.
/// With nodes of equal size, the numbers of owners per holder on one node differ by at most one.
pub fn assign_buddies(nodes: &[u32]) -> Vec<usize> {
    let mut places: Vec<u32> = nodes.to_vec();
    places.sort_unstable();
    places.dedup();
    let on = |node: u32| (0..nodes.len()).filter(move |&rank| nodes[rank] == node).collect::<Vec<_>>();
    let holder = |(rank, node): (usize, &u32)| {
        if places.len() < 2 {
            return (rank + 1) % nodes.len();
        }
        let slot = places.iter().position(|other| other == node).unwrap_or(0);
        let next = on(places[(slot + 1) % places.len()]);
        let index = on(*node).iter().position(|&other| other == rank).unwrap_or(0);
        next[index % next.len()]
    };
    nodes.iter().enumerate().map(holder).collect()
}
