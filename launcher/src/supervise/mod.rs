//! Processes: how a rank is started, watched and ended, so that nothing is left behind.

mod environment;
mod limits;
mod memory;
mod orphans;
mod proc;
mod process;
mod signals;
mod stacks;

pub(crate) use environment::Environment;
pub(crate) use limits::{check_limits, explained, raise_open_files, survive_file_size};
pub(crate) use memory::MemoryWatch;
pub(crate) use orphans::Orphans;
pub(crate) use proc::{cpu_times, handles};
pub(crate) use process::{Rank, Stdio, spawn};
pub(crate) use signals::{Caught, Signals};
pub(crate) use stacks::write_stacks;
