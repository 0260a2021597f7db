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
//!
//! In the book: `docs/checkpoints.md`.

mod catalog;
mod error;
mod exact;
mod find;
mod header;
mod keep;
mod manifest;
mod parameters;
mod read;
#[cfg(feature = "object-store")]
mod remote;
mod staging;
mod stream;

pub use catalog::{Catalog, Extent, Overlap, Saved, Section};
pub use error::{Error, Result};
pub use exact::Exact;
pub use find::{Candidate, ResumeFrom, candidates, folder_of_run};
pub use header::{Entry, Header, Layout, Part, Placed, Stored};
pub use keep::{keep_best, keep_last};
pub use manifest::{Best, Better, Counts, FORMAT_VERSION, FileInfo, Manifest};
pub use read::{Checkpoint, Piece};
#[cfg(feature = "object-store")]
pub use remote::Remote;
pub use staging::{Staging, probe, remove_abandoned, remove_leftovers};
pub use stream::{CHUNK, forget_contents, verify_file, write_file};

/// Whether what should be a path is the address of an object store.
pub fn is_remote(address: &str) -> bool {
    address.contains("://")
}

/// Uploads a whole checkpoint to the object store at this address.
///
/// # Errors
/// [`Error::Remote`] names the address and what failed; [`Error::NotFound`] in a program that was built without object stores.
pub fn upload(checkpoint: &std::path::Path, address: &str) -> Result<()> {
    #[cfg(feature = "object-store")]
    return Remote::open(address)?.upload(checkpoint);
    #[cfg(not(feature = "object-store"))]
    Err(without_remote(&format!("{}: cannot be uploaded to {address}", checkpoint.display())))
}

#[cfg(not(feature = "object-store"))]
fn without_remote(what: &str) -> Error {
    Error::NotFound(format!(
        "{what}: the program was built without object stores: build it with the feature `aws`, `azure`, `gcp` or `object-store`"
    ))
}

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
