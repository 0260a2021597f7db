use std::num::NonZeroUsize;

/// Options for saving and resuming.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckpointOptions {
    /// Number of newest checkpoints of the run to keep; older ones are removed. Default: all are
    /// kept.
    pub keep_last: Option<NonZeroUsize>,
    /// Whether all ranks write, each a share of the tensors by size. All nodes must then share the
    /// output folder.
    pub split: bool,
    /// Address of an object store (`s3://bucket/folder`) to which each checkpoint is uploaded once
    /// it is on disk.
    pub upload_to: Option<String>,
    /// Whether everything in a checkpoint must fit the program that resumes from it. Default: parts
    /// that do not change the result of the training may differ, with a warning. These are
    /// measures, datasets between two passes, the length of tasks, and items of the task list.
    pub strict: bool,
    /// Whether a run starts from the beginning, with a warning, if a checkpoint does not fit.
    /// Nothing is loaded then. Default: an error.
    pub begin_if_misfit: bool,
}
