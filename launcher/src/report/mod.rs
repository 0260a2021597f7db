//! What a person sees, and what programs read: the report of ranks that failed, progress, and events.

mod events;
mod failure;
mod outline;
mod progress;
mod rounds;
mod summary;
mod traceback;

pub(crate) use events::{Events, Happened};
pub(crate) use failure::{ExitRecord, Failure, OtherEnd, OtherRank, RankFailure};
pub(crate) use outline::Outline;
pub(crate) use progress::ProgressLines;
pub(crate) use rounds::{RoundRecord, Rounds};
pub(crate) use summary::Summary;
pub(crate) use traceback::exception;
