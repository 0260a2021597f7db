//! Data-parallel training programs that launch themselves.
//!
//! A program builds a [`HyperGraph`] and its tasks, and calls [`Launch::run`]. A program that is
//! started by hand becomes the launcher, and starts itself once per device. A program that a
//! launcher starts, be it `ice-launch` or itself, is a rank. In both cases the options of the
//! launcher are options of the program: `--devices cuda:0-3`, `--nnodes 2`, `--max-restarts 3`.
//!
//! Read `examples/mnist.rs` first: that takes five minutes.
//!
//! In the book: `docs/start.md`, then `docs/nodes.md`.

mod error;
mod options;
mod run;

pub use error::{Error, main};
pub use ice_launch::LaunchArgs;
pub use options::{BatchRule, RunOptions};
pub use run::Launch;

pub use ice_core as core;
pub use ice_core::{HyperGraph, Run};
pub use ice_nn as nn;
pub use {clap, serde_json, tch};

/// Everything that a training program needs, in one import. In the book:
/// `docs/nodes.md#names-to-know`.
pub mod prelude {
    /// `#[derive(Parser)]` writes code that names `clap::`. With this import, a program needs no
    /// dependency of that name.
    pub use clap::{self, Parser};
    pub use ice_core::data::{Dataset, Items, Labelled, Mnist, Split, Stream, items, stream};
    pub use ice_core::meter;
    pub use ice_core::optim::{Adam, AdamW, Field, Optimizer, RmsProp, Schedule, Sgd};
    pub use ice_core::{
        Autocast, Better, DatasetNode, EarlyStop, GradScaler, HParam, HyperGraph, LoadCheckpoint, LossNode,
        MetricNode, ModuleNode, Outputs, ReduceLROnPlateau, Repeat, Run, SaveBest, SaveCheckpoint,
        StreamNode, Tags, Task,
    };
    pub use ice_nn::{self as nn, Module as _, ModuleT as _};
    pub use tch::{Device, Kind, Reduction, Tensor};

    pub use crate::{Launch, RunOptions};
}
