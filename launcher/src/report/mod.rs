//! Reports for people and for programs: failed ranks, progress, and events.

mod error_file;
mod events;
mod excerpt;
mod failure;
mod outline;
mod progress;
mod rounds;
mod store_hint;
mod summary;
mod traceback;

pub(crate) use error_file::ErrorDocument;
pub(crate) use events::{Events, JobEvent};
pub(crate) use excerpt::Excerpt;
pub(crate) use failure::{ExitRecord, Failure, OtherEnd, OtherRank, RankFailure};
pub(crate) use outline::Outline;
pub(crate) use progress::ProgressLines;
pub(crate) use rounds::{RoundRecord, Rounds};
pub(crate) use store_hint::store_hint;
pub(crate) use summary::Summary;
pub(crate) use traceback::exception;
