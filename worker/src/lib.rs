//! The runtime inside a rank: it reads the environment contract, binds the one device, joins the process group, talks
//! to the agent over the link, and agrees with the other ranks on what they do together.
//!
//! This crate knows nothing of what is trained. It meets the launcher only through the formats of `ice-proto`, so a rank
//! runs under torchrun as well, without a link.
//!
//! In the book: `docs/elasticity.md`, and `docs/placement.md` for devices.

mod agree;
pub mod copies;
mod device;
mod error;
mod group;
mod link;
mod rank;
mod round;

pub use error::Error;
pub use ice_proto::backend::{DistBackend, RankDevice};
pub use ice_proto::link::Progress;
pub use link::{Alone, Boundary, Hold, Link, Stop};
pub use rank::{Begun, Worker};
