//! `ice_launch._link`, the native half of the Python package `ice_launch`: the link of a rank to its
//! agent, from `ice-link`. It imports no torch: the Python half forms process groups, and this
//! crate closes their connections when a round ends.
//!
//! In the book: `docs/elastic-python.md`.

mod link;
mod store;

use pyo3::prelude::*;

/// A rank's link to its agent.
#[pymodule(name = "_link")]
mod module {
    #[pymodule_export]
    use super::link::{Link, Round, connect};
}
