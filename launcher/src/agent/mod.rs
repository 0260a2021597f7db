//! The worker group of this node as a pure state machine: events in, actions out. It has no clock, no processes and no sockets;
//! time comes in as an argument.
//!
//! Invariants, which the tests cite:
//!
//! - **AG-1** Every rank that was started is waited for before the agent joins again or exits, unless it was killed, has not ended for
//!   a second, and the user asks for the end once more.
//! - **AG-2** Ranks start only when a round starts; the coordinator alone decides on restarts.
//! - **AG-3** The agent exits once, and does nothing afterwards.
//! - **AG-4** Ranks that were asked to end are killed once the shutdown timeout is over.
//! - **AG-5** An attempt that failed is reported once, with each rank that ended in it once and the first failure at the front.
//! - **AG-6** An agent joins only while it has a coordinator; where it is looked for again, losing it ends the round and nothing else.
//! - **AG-7** A failure is reported on each connection, before the agent joins, until a round has started there.
//! - **AG-8** A node that was told to stop leaves: at once, or, where its ranks end together with a checkpoint of all nodes', when the
//!   first of them has ended, or fails, or another node is lost, or they take too long.

mod cause;
mod events;
mod exit;
mod hangs;
mod machine;
#[cfg(test)]
mod tests;
mod timers;

pub(crate) use cause::{Cause, OutOfMemory};
pub(crate) use events::{Action, Ask, End, Event, Rules};
pub(crate) use exit::Exit;
pub(crate) use hangs::{Hang, HangWatch};
pub(crate) use machine::Agent;
pub(crate) use timers::{Expired, Timers};
