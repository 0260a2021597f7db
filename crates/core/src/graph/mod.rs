//! The graph: its nodes, their selection for a task, and the access to their outputs.

mod eager;
mod executable;
mod hyper;
mod outputs;
mod tags;

pub use eager::Eager;
pub(crate) use executable::{Entries, ExecutableGraph, Step, StepPlace};
pub(crate) use hyper::Entry;
pub use hyper::HyperGraph;
pub use outputs::Outputs;
pub use tags::Tags;
