//! Readers of common formats, one per file.

mod idx;
mod mnist;

pub use idx::Idx;
pub use mnist::{Labelled, Mnist, Split};
