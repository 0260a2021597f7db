//! Checkpoints on disk: folders that are either complete or absent.
//!
//! ```text
//! manifest.json                          version, counters, progress of the tasks, positions, checksums of the files
//! model.safetensors                      parameters and buffers: <node>.<PyTorch's key>
//! optimizer-00000-of-00001.safetensors   state of the optimizers: <node>.<PyTorch's key>.<slot>
//! ```
//!
//! If several ranks write, each writes its own files, numbered by its rank. A tensor may then be
//! divided into pieces in several files, and the metadata of each file describes its pieces. A
//! [`Catalog`] reassembles them, so that a reader sees whole tensors for any number of writers.
//!
//! This crate handles files and bytes. It does not depend on libtorch, on communication between
//! ranks, or on what is trained.
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
pub use keep::{adopt_best, keep_best, keep_last};
pub use manifest::{Best, Better, Counts, FORMAT_VERSION, FileInfo, Manifest};
pub use read::{Checkpoint, Piece};
#[cfg(feature = "object-store")]
pub use remote::Remote;
pub use staging::{Staging, probe, remove_abandoned, remove_leftovers};
pub use stream::{CHUNK, forget_contents, verify_file, write_file};

/// Whether a path is the address of an object store.
pub fn is_remote(address: &str) -> bool {
    address.contains("://")
}

/// Uploads a complete checkpoint to the object store at this address.
///
/// # Errors
/// [`Error::Remote`] with the address and the failure. [`Error::NotFound`] in a program that was
/// built without object stores.
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

/// Name of the manifest in its checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// Name of the file with all whole parameters, if one rank writes them.
pub const MODEL: &str = "model.safetensors";
/// Name of the file in which transformers and other programs find the shard of a parameter.
pub const MODEL_INDEX: &str = "model.safetensors.index.json";
/// Name of the folder for checkpoints, within the folder of a run.
pub const CHECKPOINTS: &str = "ckpts";
/// Name of the folder for the best checkpoints, within the folder of a run.
pub const BEST: &str = "best";
/// Name of the link to the newest checkpoint, next to it, for people and scripts.
pub const LATEST: &str = "latest";
