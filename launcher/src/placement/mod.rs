//! Which CPUs the ranks of a node run on. Everything is read from sysfs below a path that comes in as an argument, so that tests can
//! make machines up.
#![cfg_attr(not(test), expect(dead_code, unused_imports, reason = "wired by the supervisor"))]

mod binding;
mod cpulist;
mod error;
mod gpus;
#[cfg(test)]
mod tests;
mod topology;

pub(crate) use binding::{NumaBinding, bind};
pub(crate) use error::PlacementError;
pub(crate) use gpus::gpu_addresses;

/// Threads per rank where nobody says: cores this process may use divided by ranks of the node, at least 1.
pub(crate) fn threads_per_rank(allowed: usize, ranks: u32) -> u32 {
    let allowed = u32::try_from(allowed).unwrap_or(u32::MAX);
    (allowed / ranks.max(1)).max(1)
}
