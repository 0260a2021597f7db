//! The launcher's own machine of a node's worker group, compiled in as it stands: it knows nothing of the rest of the launcher, and is no
//! part of what the launcher's library shows.

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
