//! A rank's side of the link to its agent: the rounds that the rank takes part in, the step
//! boundaries that all ranks agree on, heartbeats, and the signals that are left to the agent.
//!
//! The crate does not know libtorch: `ice-worker` uses it for ranks in Rust, and the Python package
//! `ice_launch` for PyTorch scripts. Both give it their client of the round's [`Store`] and their
//! process [`Group`].
//!
//! In the book: `docs/elasticity.md#rounds`.

mod consensus;
mod error;
mod link;
pub mod process;
mod store;

pub use consensus::publish;
pub use error::Error;
pub use link::{Alone, Boundary, ExitGuard, Group, Link, NextRound, Stop, Waiting};
pub use store::Store;
