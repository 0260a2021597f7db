//! The binary from outside, with shells as ranks: what they are told, what becomes of failures, and that nothing is left behind.
//! Every test ends with a search for processes that came of its job.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod descendants;
mod disk;
mod environment;
mod error_file;
mod executable;
mod failures;
mod hangs;
mod limits;
mod memory;
mod nodes;
mod options;
mod output;
mod preempt;
mod reports;
mod restarts;
mod signals;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod usage;
mod warm;

const TWO: [&str; 2] = ["--devices", "cpu:0-1"];
/// What a rank does that is to be stopped.
const STAY: &str = "exec sleep 600";
