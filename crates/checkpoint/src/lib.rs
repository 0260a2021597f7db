//! Checkpoints on disk: folders that are whole or not there.
//!
//! ```text
//! manifest.json                          version, counters, progress of the tasks, positions, checksums of the files
//! model.safetensors                      parameters and buffers: <node>.<PyTorch's key>
//! optimizer-00000-of-00001.safetensors   state of the optimizers: <node>.<PyTorch's key>.<slot>
//! ```
//!
//! Where several ranks write, each has files of its own, numbered by its rank; a tensor may then lie in pieces in several of
//! them, and the metadata of each file says which elements a piece holds. A [`Catalog`] puts them together again, so that a
//! reader sees whole tensors however many ranks wrote.
//!
//! This crate knows files and bytes. It knows nothing of libtorch, of ranks that talk to each other, or of what is trained.

mod catalog;
mod error;
mod find;
mod header;
mod keep;
mod manifest;
mod read;
mod staging;
mod stream;

pub use catalog::{Catalog, Extent, Overlap, Saved, Section};
pub use error::{Error, Result};
pub use find::{Candidate, ResumeFrom, candidates};
pub use header::{Entry, Header, Layout, Part, Placed, Stored};
pub use keep::{keep_best, keep_last};
pub use manifest::{Best, Better, Counts, FORMAT_VERSION, FileInfo, Manifest};
pub use read::{Checkpoint, Piece};
pub use staging::{Staging, remove_leftovers};
pub use stream::{CHUNK, forget_contents, verify_file, write_file};

/// The manifest's name in its checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// The file of all whole parameters, where one rank writes them.
pub const MODEL: &str = "model.safetensors";
/// Where transformers and others look for the shard of a parameter.
pub const MODEL_INDEX: &str = "model.safetensors.index.json";
/// The folder of a run's checkpoints in the folder of the run.
pub const CHECKPOINTS: &str = "ckpts";
/// The folder of a run's best checkpoints in the folder of the run.
pub const BEST: &str = "best";
/// The link to the newest checkpoint beside it, for people and scripts.
pub const LATEST: &str = "latest";
