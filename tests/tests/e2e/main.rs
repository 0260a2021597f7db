//! End-to-end tests: the programs as users start them.
//!
//! Every process is started through [`support::Job`], which kills the process and all of its
//! descendants when the test ends, and which finds processes that a finished job has left behind.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod architecture;
mod board;
mod chaos;
mod dependencies;
mod elastic;
mod elastic_python;
mod elastic_python_chaos;
mod failures;
mod forms;
mod gpt;
mod hostile;
mod images;
mod kills;
mod leaving;
mod outside;
mod python;
mod readme;
#[path = "../../../launcher/tests/nodes/server.rs"]
#[expect(dead_code, reason = "the launcher's tests use the rest")]
mod server;
mod several;
mod signals;
mod stopping;
mod store;
mod support;
mod terminal;
mod torchrun;
mod training;
mod usage;
