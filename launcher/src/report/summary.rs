//! `report.json`: the course of the job on this node, for programs.

use std::io;

use ice_proto::exit::ExitCode;
use serde::Serialize;

use super::{Excerpt, Failure, RoundRecord};

/// Version of the format, which increases when a field changes its meaning or is removed.
const VERSION: u32 = 1;

/// Content of `report.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    version: u32,
    run_id: String,
    /// `running`, `succeeded`, `preempted`, `stopped` or `failed`.
    outcome: &'static str,
    exit_code: Option<u8>,
    /// The attempts that failed on this node, in order.
    failures: Excerpt<Failure>,
    /// Number of failures that the list does not hold.
    failures_left_out: u64,
    /// The rounds, as seen by this node, in order.
    rounds: Excerpt<RoundRecord>,
    /// Number of rounds that the list does not hold.
    rounds_left_out: u64,
    /// Share of the time in applied steps, from 0 to 1. Null for a program that reports no steps.
    goodput: Option<f64>,
    /// The first log or report that could not be written, and the error.
    log_failure: Option<String>,
}

impl Summary {
    pub(crate) fn new(run_id: &str) -> Self {
        Self {
            version: VERSION,
            run_id: run_id.to_owned(),
            outcome: "running",
            exit_code: None,
            failures: Excerpt::default(),
            failures_left_out: 0,
            rounds: Excerpt::default(),
            rounds_left_out: 0,
            goodput: None,
            log_failure: None,
        }
    }

    pub(crate) fn add(&mut self, failure: Failure) {
        self.failures.push(failure);
        self.failures_left_out = self.failures.left_out();
    }

    pub(crate) fn set_rounds(&mut self, rounds: &Excerpt<RoundRecord>, goodput: Option<f64>) {
        (self.rounds, self.rounds_left_out) = (rounds.clone(), rounds.left_out());
        self.goodput = goodput;
    }

    /// Returns `running`, or how the job ended.
    pub(crate) fn outcome(&self) -> &'static str {
        self.outcome
    }

    pub(crate) fn has_failures(&self) -> bool {
        !self.failures.is_empty()
    }

    pub(crate) fn end(&mut self, code: ExitCode) {
        self.outcome = match code {
            ExitCode::Success => "succeeded",
            ExitCode::Requeue(_) => "preempted",
            ExitCode::Signal(_) if self.failures.is_empty() => "stopped",
            _ => "failed",
        };
        self.exit_code = Some(code.code());
    }

    /// Returns the text of the file. `log_failure` names the first log or report that could not be
    /// written.
    pub(crate) fn text(&mut self, log_failure: Option<String>) -> io::Result<Vec<u8>> {
        self.log_failure = log_failure;
        Ok(serde_json::to_vec_pretty(self)?)
    }
}
