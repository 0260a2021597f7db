use std::num::NonZeroUsize;

/// How a run saves and resumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Keeps the newest so many checkpoints of the run and removes older ones; all where there is no number.
    pub keep_last: Option<NonZeroUsize>,
    /// All ranks write, each a share of the tensors by size. All nodes must then share the output folder.
    pub split: bool,
    /// The address of an object store (`s3://bucket/folder`) that each checkpoint is uploaded to once it is on the disk.
    pub upload_to: Option<String>,
    /// Whether a checkpoint that does not fit the program ends the run. Otherwise the run starts from the beginning, with a
    /// warning, and loads nothing of it.
    pub strict: bool,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self { keep_last: None, split: false, upload_to: None, strict: true }
    }
}
