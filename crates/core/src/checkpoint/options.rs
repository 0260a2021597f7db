use std::num::NonZeroUsize;

/// How a run saves and resumes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckpointOptions {
    /// Keeps the newest so many checkpoints of the run and removes older ones; all where there is no number.
    pub keep_last: Option<NonZeroUsize>,
    /// All ranks write, each a share of the tensors by size. All nodes must then share the output folder.
    pub split: bool,
    /// The address of an object store (`s3://bucket/folder`) that each checkpoint is uploaded to once it is on the disk.
    pub upload_to: Option<String>,
    /// Whether everything in a checkpoint must fit the program that resumes from it. Default: what does not change the result of the training may
    /// differ, and is named in a warning: measures, datasets between two passes, the length of tasks, and items of the task list.
    pub strict: bool,
    /// Whether a run starts from the beginning if a checkpoint does not fit, with a warning, and loads nothing of it. Default: that is an error.
    pub begin_if_misfit: bool,
}
