//! The coordinator assigns nodes and ranks, round by round. It is pure: no clock, no sockets, no
//! randomness.
//!
//! Events go in with the time since the start, actions come out. Tests cite these invariants by
//! number:
//!
//! - **RV-1** The ranks of a round are 0..world size, each once, and node ranks 0..nodes.
//! - **RV-2** All members of a round receive the same view of it, and each its own assignment.
//! - **RV-3** A round starts only with MIN to MAX nodes.
//! - **RV-4** There are never more restarts than the policy allows, and each decision about one has
//!   a reason.
//! - **RV-5** After the job is closed no round starts.
//! - **RV-6** When all nodes have joined, each receives the start of the round, a request to wait,
//!   or the end of the job.
//! - **RV-7** At most one round is live: each member of a round has received its end, or is gone,
//!   before the next one starts.
//! - **RV-8** A member that stays connected is in the next round, whichever nodes have joined.
//! - **RV-9** Once nothing changes, every node that wants to join is in the round, or waits because
//!   the round has MAX nodes. Both are decided within the last call.
//! - **RV-10** A coordinator that continues a job starts no round of a number that was used, grants
//!   no restart twice, and does not reopen a closed job.
//! - **RV-11** The failure of a round counts once, whichever agent reports it, however often, and
//!   to whichever coordinator. It is lost only if all agents that saw it are gone, or if the
//!   failure of a later round has counted.
//! - **RV-12** The coordinator sends a standstill only if no node of the round works, and only to
//!   the node that waits and is furthest behind.
//!
//! In the book: `docs/design.md#decisions-are-made-by-machines-without-a-clock`; the limits of one
//! coordinator: `docs/scale.md`.

mod admission;
mod machine;
mod nodes;
mod rank_assignment;
mod record;
mod restarts;
mod round_check;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use machine::{Action, Coordinator, Event, Settings};
pub use nodes::Peer;
pub use record::Record;
pub use round_check::check_round;
