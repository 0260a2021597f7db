//! The runtime inside a rank: it reads the environment contract, binds the device, joins the
//! process group, communicates with the agent over the link, and agrees with the other ranks on
//! common actions.
//!
//! This crate knows nothing of training. It shares only the formats of `ice-proto` with the
//! launcher, so a rank also runs under torchrun, without a link.
//!
//! In the book: `docs/elasticity.md`, and `docs/placement.md` for devices.

mod device;
mod error;
mod group;
mod rank;
pub mod replica;
mod round;
mod store;

pub use error::Error;
pub use ice_link::{Alone, Boundary, ExitGuard, Link, Stop};
pub use ice_proto::backend::{DistBackend, RankDevice};
pub use ice_proto::link::TrainingProgress;
pub use rank::{PendingCollective, Worker};
