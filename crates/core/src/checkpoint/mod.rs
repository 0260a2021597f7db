//! Checkpoints: folders that are whole or not there.
//!
//! ```text
//! manifest.json                          version, counters, progress of the tasks, positions, checksums of the files
//! model.safetensors                      parameters and buffers: <node>.<PyTorch's key>
//! optimizer-00000-of-00001.safetensors   state of the optimizers: <node>.<PyTorch's key>.<slot>
//! ```
//!
//! A node tagged `train` is `train/<name>` in the keys, one tagged `*` just its name.

mod find;
mod manifest;
mod read;
mod tensors;
mod write;

use std::path::PathBuf;
use std::str::FromStr;

pub use manifest::Manifest;
pub use read::Checkpoint;
pub(crate) use write::Writer;

const MANIFEST: &str = "manifest.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer-00000-of-00001.safetensors";

/// Which checkpoint to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResumeFrom {
    /// The newest valid one of this run id below the output folder.
    Latest,
    /// A checkpoint's folder, or one that holds checkpoints: the newest valid one in it.
    Path(PathBuf),
}

impl FromStr for ResumeFrom {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(if s == "latest" { Self::Latest } else { Self::Path(s.into()) })
    }
}

/// What the keys of a node start with.
fn key_prefix(uid: &str) -> String {
    format!("{}.", uid.strip_prefix("*/").unwrap_or(uid))
}
