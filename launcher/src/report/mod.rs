//! What a person sees: the report of a rank that failed, and progress.

mod failure;
mod progress;

pub(crate) use failure::Failure;
pub(crate) use progress::ProgressLines;
