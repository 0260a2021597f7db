//! Ranks that know the link: they stop at a step boundary, and are missed when they stand still.

use std::fs;
use std::path::Path;

use ice_proto::exit::ExitCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::tempdir;

use crate::forms::Run;
use crate::support::{Program, SOON, TRAINING, built, wait_until};

/// The events of this name.
fn events(file: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let whole = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    whole.filter(|event| event["event"] == name).collect()
}

#[test]
fn a_run_that_is_stopped_loses_no_step() {
    let folder = tempdir().unwrap();
    let (out, log) = (folder.path().join("out"), folder.path().join("events"));
    let run = Run::new(&out).args(["--epochs", "1", "--steps", "100000", "--save-every-steps", "20"]);
    let options = ["--devices", "cpu:0-1", "--run-id", "digits", "--events", log.to_str().unwrap()];
    let job = run.under_ice_launch(&options).start();
    wait_until(TRAINING, "a checkpoint", || !events(&log, "checkpoint_saved").is_empty());
    job.signal(Signal::INT);
    let outcome = job.finish(TRAINING);
    outcome.expect_code(ExitCode::Signal(2).code().into());
    let ended = events(&log, "rank_ended");
    assert_eq!(ended.len(), 2);
    for rank in &ended {
        assert_eq!(rank["exit_code"], 0, "not ended by itself: {rank} {}", outcome.transcript());
    }
    // What was saved was written to its end.
    let saved = events(&log, "checkpoint_saved");
    for checkpoint in &saved {
        assert!(
            Path::new(checkpoint["path"].as_str().unwrap()).join("manifest.json").is_file(),
            "{checkpoint}"
        );
    }
    let resume = Run::new(&out).args(["--epochs", "1", "--steps", "100000", "--resume-from", "latest"]);
    let job = resume.under_ice_launch(&options).start();
    let line = job.wait_for_line(TRAINING, |line| line.starts_with("resuming from"));
    let last = saved.last().unwrap();
    assert!(line.ends_with(last["path"].as_str().unwrap()), "{line}, and the last one is {last}");
    job.signal(Signal::TERM);
    job.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
}

#[test]
fn a_rank_that_is_behind_is_found_and_the_job_restarted() {
    let folder = tempdir().unwrap();
    let logs = folder.path().to_str().unwrap();
    let options = ["--devices", "cpu:0-1", "--hang-timeout", "1", "--max-restarts", "1", "--log-dir", logs];
    let outcome = Program::ice_launch(options).arg(built("rank")).args(["stall", "1", "5"]).run(SOON);
    let said =
        ["rank 1 failed: hung: no rank got anything done for 3 s; it is at step 4 of 4", "restart 1 of 1"];
    outcome.expect_code(0).expect_in_stderr(&said);
    let stacks = fs::read_to_string(outcome.report("logs")).unwrap();
    assert!(stacks.contains("thread ") && stacks.contains("rank"), "{stacks}");
}

#[test]
fn a_rank_that_is_suspended_is_found() {
    let folder = tempdir().unwrap();
    let log = folder.path().join("events");
    let options = ["--devices", "cpu:0-1", "--hang-timeout", "1", "--events", log.to_str().unwrap()];
    let job = Program::ice_launch(options).arg(built("rank")).arg("step").start();
    job.wait_for_line(SOON, |line| line.contains("step 3"));
    let second = events(&log, "rank_started").into_iter().find(|event| event["rank"] == 1).unwrap();
    let pid = second["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).unwrap())).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let outcome = job.finish(SOON);
    outcome.expect_code(1).expect_in_stderr(&["rank 1 failed: hung", "silent for"]);
    let stacks = fs::read_to_string(outcome.report("logs"));
    assert!(stacks.is_err() || stacks.unwrap().contains("T (stopped)"));
}
