//! Starts, watches and ends the processes of ranks, so that no process is left behind.

mod drain;
mod environment;
mod executable;
mod heartbeats;
mod keeper;
mod limits;
mod mark;
mod memory;
mod proc;
mod process;
mod signals;
mod stacks;
mod stuck;
mod timer_pipe;
mod tree;

/// Number of a process that the agent has started, from 1.
pub(crate) type ProcessId = u64;

pub(crate) use drain::{Ending, Orders, Remains};
pub(crate) use environment::{Environment, expected_thread_variables};
pub(crate) use executable::Executable;
pub(crate) use heartbeats::Heartbeats;
pub(crate) use limits::{check_limits, explained, raise_open_files, survive_file_size};
pub(crate) use mark::TEMPLATE;
pub(crate) use memory::MemoryWatch;
pub(crate) use proc::{cpu_times, descendants, handles};
pub(crate) use process::{Rank, Start, Stdio, spawn};
pub(crate) use signals::{Caught, Signals};
pub(crate) use stacks::{Stacks, write_stacks};
pub(crate) use timer_pipe::{TimerPipe, TimerRequest};
pub(crate) use tree::ProcessTree;
