//! From a graph to a checkpoint on disk and back. The files themselves are `ice-checkpoint`'s.
//!
//! A node tagged `train` is `train/<name>` in the keys, one tagged `*` just its name.

mod exchange;
mod fit;
mod init;
mod kinds;
mod load;
mod memory;
mod options;
mod share;
mod snapshot;
mod writer;

pub use ice_checkpoint::{Best, Better, Checkpoint, Manifest, Part, ResumeFrom};
pub use init::InitFrom;
pub use options::CheckpointOptions;

pub(crate) use load::{Kept, Selection, Strictness, is_misfit, load};
pub(crate) use memory::{Label, pack, unpack};
pub(crate) use share::share;
pub(crate) use writer::{Keep, Request, Writer};

#[cfg(test)]
mod tests;

/// What the keys of a node start with.
fn key_prefix(uid: &str) -> String {
    format!("{}.", uid.strip_prefix("*/").unwrap_or(uid))
}
