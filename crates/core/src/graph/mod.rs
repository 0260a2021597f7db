//! The graph: which nodes there are, which of them a task selects, and how they find each other's outputs.

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
