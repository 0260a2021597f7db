//! Safe bindings to libtorch's `torch.distributed` (c10d): the store that processes meet at,
//! process groups and their collectives, the reducer of `DistributedDataParallel`, fused optimizer
//! steps, mixed precision, and modules in TorchScript.
//!
//! The crate does not depend on launchers, rounds or training. It contains the project's calls into
//! foreign code, so that other crates need no `unsafe`. No C++ exception passes it: each becomes an
//! [`Error`] with a [kind](ErrorKind).
//!
//! ```no_run
//! use std::time::Duration;
//! use ice_c10d::{GlooOptions, ProcessGroup, ReduceOp, Store};
//!
//! let store = Store::tcp("127.0.0.1", 29500, Duration::from_secs(60))?;
//! let group = ProcessGroup::gloo(&store, 0, 2, &GlooOptions::default())?;
//! let tensor = tch::Tensor::from_slice(&[1.0_f32, 2.0]);
//! group.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
//! # Ok::<(), ice_c10d::Error>(())
//! ```
//!
//! In the book: groups and stores when a rank is lost (`docs/elasticity.md#rounds`), and the place
//! of this crate in the project (`docs/design.md`).

pub mod amp;
mod batch_norm;
mod error;
mod ffi;
mod group;
pub mod memory;
pub mod nccl;
pub mod optim;
mod reducer;
mod script;
mod store;
#[doc(hidden)]
pub mod testing;
mod work;

pub use batch_norm::{BatchStatistics, batch_norm};
pub use error::{Error, ErrorKind, Result};
pub use group::{GlooOptions, ProcessGroup, ReduceOp};
pub use reducer::{Reducer, ReducerOptions, run_backward};
pub use script::ScriptModule;
pub use store::Store;
pub use work::Work;

/// Version of the libtorch headers of this build. The build accepts only the version that tch
/// supports.
pub const TORCH_VERSION: &str = env!("ICE_TORCH_VERSION");
