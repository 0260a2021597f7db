//! The coordinator: who is in, who has which rank, round by round. Pure: no clock, no sockets, no randomness.
//!
//! Events go in with the time since the start, actions come out. Invariants, which the tests cite:
//!
//! - **RV-1** The ranks of a round are 0..world size, each once, and node ranks 0..nodes.
//! - **RV-2** All members of a round are told the same of it, and each its own part.
//! - **RV-3** A round starts only with MIN to MAX nodes.
//! - **RV-4** There are never more restarts than the policy allows, and each decision about one says why.
//! - **RV-5** After the job is closed no round starts.
//! - **RV-6** When all nodes have joined, each is told that the round started, that it has to wait, or that the job is closed.
//! - **RV-7** At most one round is live: a member hears that it is broken, or is gone, before the next one starts.
//! - **RV-8** A member that stays is in the next round, whoever else has come.
//! - **RV-9** When nothing changes any more, everybody who wants in is in, or waits because there are MAX nodes, within the last call.
//! - **RV-10** A coordinator that takes over starts no round of a number that was used, grants no restart twice, and opens no job that is
//!   closed.
//! - **RV-11** The failure of a round counts once, whoever reports it, how often, and to which coordinator. It is forgotten only with the
//!   agents that saw it, or where the failure of a later round has counted.
//! - **RV-12** The coordinator sends a standstill only if no node of the round works, and only to the node that waits and is furthest
//!   behind.
//!
//! In the book: `docs/design.md#decisions-are-made-by-machines-without-a-clock`; at which size one coordinator ends, `docs/scale.md`.

mod admission;
mod coordinator;
mod nodes;
mod places;
#[cfg(test)]
mod random;
mod record;
mod restarts;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod views;

pub use coordinator::{Action, Coordinator, Event, Peer, Settings};
pub use record::Record;
pub use views::check_views;
