//! Ranks that know the link: they stop at a step boundary, and hangs of theirs are detected.

use std::fs;
use std::path::Path;

use ice_proto::exit::ExitCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::tempdir;

use crate::forms::Run;
use crate::support::{Finished, Job, Program, SOON, TRAINING, Traces, built, free_port, wait_until};

/// Returns the events of this name.
pub(crate) fn events(file: &Path, name: &str) -> Vec<Value> {
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
    // Every saved checkpoint is complete.
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

/// Returns the numbers of steps in the checkpoints so far.
pub(crate) fn saved(log: &Path) -> Vec<u64> {
    events(log, "checkpoint_saved").iter().map(|event| event["step"].as_u64().unwrap()).collect()
}

#[test]
fn signals_save_pause_and_resume_all_ranks_at_one_step() {
    let folder = tempdir().unwrap();
    let (out, log) = (folder.path().join("out"), folder.path().join("events"));
    let run = Run::new(&out).args(["--epochs", "1", "--steps", "100000"]);
    let logs = folder.path().join("logs");
    let options = ["--events", log.to_str().unwrap(), "--log-dir", logs.to_str().unwrap()];
    let job = run.under_ice_launch(&[&["--devices", "cpu:0-1"], &options[..]].concat()).start();
    job.wait_for_error_text(TRAINING, "step");
    let save = |count: usize| {
        job.signal(Signal::USR1);
        wait_until(SOON, "a checkpoint", || saved(&log).len() == count);
    };
    save(1);
    job.signal(Signal::USR2);
    wait_until(SOON, "a pause", || events(&log, "paused").len() == 2);
    save(2);
    save(3);
    job.signal(Signal::USR2);
    wait_until(SOON, "the end of the pause", || events(&log, "resumed").len() == 2);
    save(4);
    let steps = saved(&log);
    assert!(steps[0] < steps[1] && steps[1] == steps[2] && steps[2] < steps[3], "{steps:?}");
    job.signal(Signal::TERM);
    let outcome = job.finish(TRAINING);
    assert_eq!(events(&log, "paused").len(), 2);
    let steps = saved(&log);
    assert_eq!(steps.len(), 5, "SIGTERM saves without asking");
    let newest = format!("the newest checkpoint, after step {}, is ", steps[4]);
    outcome.expect_code(ExitCode::Signal(15).code().into()).expect_in_stderr(&[&newest]);
    let run = fs::read_dir(&logs).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["outcome"], "stopped");
    assert_eq!(report["rounds"][0]["ended_by"], "told to stop by SIGTERM");
}

/// Starts a job at a terminal, interrupts it, and waits for its question.
fn interrupted(out: &Path, log: &Path) -> Job {
    let run = Run::new(out).args(["--epochs", "1", "--steps", "100000"]);
    let program = run.under_ice_launch(&["--devices", "cpu:0-1", "--events", log.to_str().unwrap()]);
    let mut job = program.at_a_terminal().start();
    job.wait_for_text(TRAINING, "step");
    job.type_keys("\x03");
    job.wait_for_text(SOON, "Should I save the checkpoint? [Y/n]");
    job
}

#[test]
fn ctrl_c_at_a_terminal_pauses_and_asks() {
    let interrupt = ExitCode::Signal(2).code().into();
    for (answer, checkpoints) in [("y\n", 1), ("\n", 1), ("n\n", 0), ("\x03", 0)] {
        let folder = tempdir().unwrap();
        let (out, log) = (folder.path().join("out"), folder.path().join("events"));
        let mut job = interrupted(&out, &log);
        job.type_keys(answer);
        job.finish(TRAINING).expect_code(interrupt);
        assert_eq!(saved(&log).len(), checkpoints, "{answer:?}");
    }
    let folder = tempdir().unwrap();
    let (out, log) = (folder.path().join("out"), folder.path().join("events"));
    let mut job = interrupted(&out, &log);
    job.type_keys("c\n");
    wait_until(SOON, "the end of the pause", || events(&log, "resumed").len() == 2);
    drop(job);
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
    // A temporary folder of logs is gone once the job has finished.
    let logs = folder.path().join("logs");
    let options = ["--devices", "cpu:0-1", "--hang-timeout", "1", "--events", log.to_str().unwrap()];
    let job = Program::ice_launch(options).args(["--log-dir", logs.to_str().unwrap()]);
    let job = job.arg(built("rank")).arg("step").start();
    job.wait_for_line(SOON, |line| line.contains("step 3"));
    let second = events(&log, "rank_started").into_iter().find(|event| event["rank"] == 1).unwrap();
    let pid = second["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).unwrap())).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let outcome = job.finish(SOON);
    outcome.expect_code(1).expect_in_stderr(&["rank 1 failed: hung", "silent for"]);
    // A stopped process may have no stacks. A file that is named exists.
    let logs = outcome.report("logs");
    assert!(logs.starts_with("none") || fs::read_to_string(logs).unwrap().contains("T (stopped)"), "{logs}");
}

#[test]
fn a_rank_that_leaves_the_steps_before_the_others_is_found() {
    let options = ["--devices", "cpu:0-1", "--hang-timeout", "1"];
    let outcome = Program::ice_launch(options).arg(built("rank")).args(["part", "1"]).run(SOON);
    outcome.expect_code(1).expect_in_stderr(&["rank 1 failed: hung: no rank got anything done for 3 s"]);
}

#[test]
fn a_rank_that_is_alone_at_work_may_keep_the_others_waiting() {
    // Longer than the timeout, which is at least 3 s.
    let options = ["--devices", "cpu:0-1", "--hang-timeout", "1"];
    Program::ice_launch(options).arg(built("rank")).args(["alone", "6"]).run(SOON).expect_code(0);
}

/// Starts one `rank` on each of two nodes, which hang after 3 s, the shortest timeout.
fn rank_on_two_nodes(arguments: [&str; 2]) -> [Job; 2] {
    let port = free_port().to_string();
    ["0", "1"].map(|node| {
        Program::ice_launch(["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", &port])
            .args(["--node-rank", node, "--devices", "cpu:0", "--hang-timeout", "1"])
            .arg(built("rank"))
            .args(arguments)
            .start()
    })
}

#[test]
fn ranks_of_two_nodes_that_wait_for_each_other_outside_of_steps_are_found() {
    let jobs = [["part", "1"], ["meet", "1"], ["alone", "6"]].map(rank_on_two_nodes);
    let [part, meet, alone] = jobs.map(|nodes| nodes.map(|node| node.finish(SOON)));
    let hung = "failed: hung: no rank got anything done for 3 s";
    part[1].expect_code(1).expect_in_stderr(&[&format!("rank 1 {hung}")]);
    part[0].expect_code(1).expect_in_stderr(&["the job is over", "node 1"]);
    // Neither rank is behind, and one failure ends the round.
    meet.iter().for_each(|node| _ = node.expect_code(1));
    let blamed = meet.iter().filter(|node| node.stderr.contains(hung));
    assert_eq!(blamed.count(), 1, "{}", meet.each_ref().map(Finished::transcript).concat());
    alone.iter().for_each(|node| _ = node.expect_code(0));
}

#[test]
fn checkpoint_of_some_nodes_is_not_named_as_the_one_to_resume_from() {
    let traces = Traces::new();
    let (log, tagged) = (traces.path("events"), traces.path("tagged"));
    let launcher = Program::ice_launch(["--devices", "cpu:0", "--events", &log]);
    let outcome = traces.trainee(launcher, 1).args(["--repeats", "1", "--tagged", &tagged]).run(TRAINING);
    outcome.expect_code(0);
    assert!(Path::new(&tagged).join("manifest.json").is_file(), "{}", outcome.transcript());
    let saved = events(Path::new(&log), "checkpoint_saved");
    assert!(!saved.is_empty());
    for checkpoint in saved {
        assert_ne!(checkpoint["path"].as_str().unwrap(), tagged);
    }
}
