//! Tests of the binary with shells as ranks: their environment, effects of failures, and that no
//! process is left behind. Every test ends with a search for descendants of its job.

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
/// Script of a rank that runs until it is stopped.
const STAY: &str = "exec sleep 600";
