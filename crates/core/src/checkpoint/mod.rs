//! Saving a graph to a checkpoint and loading it back. The crate `ice-checkpoint` reads and writes
//! the files.
//!
//! In the keys, a node tagged `train` is `train/<name>`, and a node tagged `*` is just its name.

mod broadcast;
mod compat;
mod dtype;
mod exchange;
mod init;
mod load;
mod memory;
mod options;
mod snapshot;
mod writer;

pub use ice_checkpoint::{Best, Better, Checkpoint, Manifest, Part, ResumeFrom};
pub use init::InitFrom;
pub use options::CheckpointOptions;

pub(crate) use broadcast::broadcast;
pub(crate) use load::{Selection, Strictness, UnclaimedState, is_misfit, load};
pub(crate) use memory::{Label, pack, unpack};
pub(crate) use writer::{Keep, Request, Writer};

#[cfg(test)]
mod tests;

/// Returns the prefix of the keys of a node.
fn key_prefix(uid: &str) -> String {
    format!("{}.", uid.strip_prefix("*/").unwrap_or(uid))
}
