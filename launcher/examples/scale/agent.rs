//! The launcher's own state machine of a node's worker group, compiled in unchanged. The machine
//! depends on no other part of the launcher, and is not public in the launcher's library.

#[path = "../../src/agent/cause.rs"]
#[expect(dead_code, reason = "the simulation has no kernel")]
mod cause;
#[path = "../../src/agent/events.rs"]
#[expect(dead_code, reason = "the dispatcher uses the rest")]
mod events;
#[path = "../../src/agent/exit.rs"]
#[expect(dead_code, reason = "the simulation has no use for the words")]
mod exit;
#[path = "../../src/agent/machine.rs"]
#[expect(dead_code, reason = "the dispatcher uses the rest")]
mod machine;

pub(crate) use events::{Action, Event, Rules};
pub(crate) use exit::Exit;
pub(crate) use machine::Agent;
