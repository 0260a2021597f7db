//! The worker group of this node as a pure state machine: events in, actions out. The machine has
//! no clock, no processes and no sockets. Every call passes the time as an argument. The crate
//! also has the watch for hangs, the timers that ranks set, and how a rank ends.
//!
//! In the book: `docs/elasticity.md#rounds`.
//!
//! Invariants, which the tests cite:
//!
//! - **AG-1** The agent waits for every rank that was started before it joins again or exits. The
//!   exception is a rank that was killed and has not ended within a second, if the user then asks
//!   for the end once more.
//! - **AG-2** Ranks start only when a round starts; the coordinator alone decides on restarts.
//! - **AG-3** The agent exits once, and does nothing afterwards.
//! - **AG-4** Ranks that were asked to end are killed once the shutdown timeout is over.
//! - **AG-5** A failed attempt is reported once. The report names each rank that ended in the
//!   attempt once, the first failure at the front.
//! - **AG-6** An agent joins only while it has a coordinator. If the agent may look for the
//!   coordinator again, losing it ends the round and nothing else.
//! - **AG-7** A failure is reported on each connection, before the agent joins, until a round has
//!   started there.
//! - **AG-8** A node that was asked to stop leaves at once, unless its ranks end together with a
//!   checkpoint of all nodes. In that case the node leaves when the first of its ranks has ended or
//!   fails, when another node is lost, or when the ranks take too long.

mod cause;
mod events;
mod exit;
mod hangs;
mod timers;
mod worker_group;

pub use cause::{Cause, OutOfMemory};
pub use events::{Action, End, Event, GroupConfig, StopRequest};
pub use exit::Exit;
pub use hangs::{Hang, HangTimeout, HangWatch};
pub use timers::{Expired, Timers};
pub use worker_group::WorkerGroup;
