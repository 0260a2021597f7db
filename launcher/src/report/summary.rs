//! `report.json`: how the job went on this node, for programs.

use std::path::Path;
use std::{fs, io};

use ice_proto::exit::ExitCode;
use serde::Serialize;

use super::{Failure, RoundRecord};

/// Grows when a field changes its meaning or goes.
const VERSION: u32 = 1;

/// What `report.json` holds.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    version: u32,
    run_id: String,
    /// `running`, `succeeded`, `preempted` or `failed`.
    outcome: &'static str,
    exit_code: Option<u8>,
    /// The attempts that failed on this node, in order.
    failures: Vec<Failure>,
    /// The rounds, as this node saw them, in order.
    rounds: Vec<RoundRecord>,
    /// The share of the time in steps that were applied, from 0 to 1; null for a program that tells of no steps.
    goodput: Option<f64>,
    /// The first log or report that could not be written, and why.
    log_failure: Option<String>,
}

impl Summary {
    pub(crate) fn new(run_id: &str) -> Self {
        let (failures, rounds) = (Vec::new(), Vec::new());
        let (run_id, outcome) = (run_id.to_owned(), "running");
        Self {
            version: VERSION,
            run_id,
            outcome,
            exit_code: None,
            failures,
            rounds,
            goodput: None,
            log_failure: None,
        }
    }

    pub(crate) fn add(&mut self, failure: Failure) {
        self.failures.push(failure);
    }

    pub(crate) fn set_rounds(&mut self, rounds: &[RoundRecord], goodput: Option<f64>) {
        (self.rounds, self.goodput) = (rounds.to_vec(), goodput);
    }

    /// `running`, or how the job ended.
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

    pub(crate) fn set_log_failure(&mut self, failure: Option<String>) {
        self.log_failure = failure;
    }

    /// Writes it whole: beside, then renamed.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let beside = path.with_extension("json.partial");
        let written = fs::write(&beside, serde_json::to_vec_pretty(self)?);
        if let Err(error) = written {
            // A full disk may keep a part of it.
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        fs::rename(&beside, path)
    }
}
