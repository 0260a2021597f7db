//! The coordinator: who is in, who has which rank, round by round. Pure: no clock, no sockets, no randomness.
//!
//! Events go in with the time since the start, actions come out. Invariants, which the tests cite:
//!
//! - **RV-1** The ranks of a round are 0..world size, each once, and node ranks 0..nodes.
//! - **RV-2** All members of a round are told the same view of it.
//! - **RV-3** A round starts only when it has all its nodes.
//! - **RV-4** There are never more restarts than the policy allows, and each decision about one says why.
//! - **RV-5** After the job is closed no round starts.
//! - **RV-6** When all nodes have joined, each is told that the round started or that the job is closed.

mod admission;
mod coordinator;
mod restarts;
#[cfg(test)]
mod tests;

pub use coordinator::{Action, Coordinator, Event, Peer, Settings};
