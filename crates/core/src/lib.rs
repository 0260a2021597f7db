//! A hypergraph of tagged nodes, the tasks that run over it, and checkpoints that resume exactly.
//!
//! A [`HyperGraph`] holds nodes: datasets, modules, losses, metrics. Tags select the nodes that
//! take part in a task: a module tagged `*` is shared by a training set tagged `train` and a test
//! set tagged `val`. A [`Task`] selects nodes by tags and runs them step by step. A node asks for
//! the output of another node by name, and that node then runs first.
//!
//! This crate does not depend on launchers. It communicates with other ranks only through
//! `ice-worker`.
//!
//! # In the book
//!
//! - `docs/nodes.md`: [`HyperGraph`], [`Node`] and its implementations, [`Outputs`], [`Tags`],
//!   [`Task`]s, [`Run`], [`Eager`]
//! - `docs/data.md`: [`data`]
//! - `docs/optimizers.md`: [`optim`], [`Autocast`], [`GradScaler`]
//! - `docs/metrics.md`: [`meter`], [`Measure`], [`HParam`], [`Probe`]
//! - `docs/checkpoints.md`: [`SaveCheckpoint`], [`SaveBest`], [`LoadCheckpoint`], [`ResumeFrom`],
//!   [`InitFrom`], [`Manifest`]
//! - `docs/use.md`: [`Eager`]
//! - `docs/elasticity.md`: [`ElasticBatch`], and the fate of a step when a rank is lost

mod checkpoint;
mod collectives;
mod counters;
pub mod data;
mod dtype;
mod error;
mod graph;
pub mod meter;
mod node;
pub mod optim;
mod precision;
mod run;
mod task;
mod tensorboard;

pub use checkpoint::{Best, Better, Checkpoint, CheckpointOptions, InitFrom, Manifest, Part, ResumeFrom};
pub use counters::Counters;
pub use error::{Error, Result};
pub use graph::{Eager, HyperGraph, Outputs, Tags};
pub use ice_worker::Worker;
pub use node::{
    BatchShare, Context, DatasetNode, LossNode, LrReduction, Measure, MetricNode, ModuleNode, Node,
    NodeState, Probe, Round, SharedNode, StreamNode, TorchScript, Value,
};
pub use precision::{Autocast, GradScaler};
pub use run::{ElasticBatch, LrRule, Run, RunConfig, Runs};
pub use task::{
    Call, CallWith, EarlyStop, LoadCheckpoint, ReduceLROnPlateau, Repeat, SaveBest, SaveCheckpoint, Task,
    TaskItem, TrainLength,
};
pub use tensorboard::HParam;
