//! Several runs in one program.

use rustix::process::Signal;

use crate::support::{Program, TRAINING, Traces, last_pass};

/// Keys of the manifests that are the same in a disturbed and an undisturbed training.
const SAME: [&str; 4] = ["run", "counters", "tasks", "measures"];

fn training(traces: &Traces, life: u64, options: &[&str]) -> Program {
    let launcher = Program::ice_launch(["--devices", "cpu:0-1", "--max-restarts", "2", "--run-id", "folds"]);
    traces.trainee(launcher, life).args(["--runs", "2"]).args(options)
}

fn undisturbed() -> Traces {
    let traces = Traces::new();
    let outcome = training(&traces, 1, &["--repeats", "3"]).run(TRAINING);
    outcome.expect_code(0);
    let ends = outcome.stdout.lines().filter(|line| line.ends_with("is at its end"));
    assert_eq!(ends.collect::<Vec<_>>(), ["run 1 is at its end", "run 2 is at its end"]);
    traces
}

#[test]
fn rank_lost_in_the_second_run_comes_back_to_that_run() {
    let undisturbed = undisturbed();
    for lost in ["0", "1"] {
        let traces = Traces::new();
        let outcome = training(&traces, 1, &["--repeats", "3", "--dies", lost]).run(TRAINING);
        outcome.expect_code(0);
        assert!(outcome.stdout.contains("from the memory of rank"), "{}", outcome.transcript());
        assert!(!outcome.stdout.contains("resuming from"), "{}", outcome.transcript());
        traces.assert_same_end(&undisturbed, &SAME, &outcome.transcript());
    }
}

#[test]
fn job_killed_in_the_second_run_resumes_that_run() {
    let undisturbed = undisturbed();
    let traces = Traces::new();
    let job = training(&traces, 1, &["--repeats", "3", "--save-every-steps", "2"]).start();
    job.wait_for_line(TRAINING, |line| line == "run 1 is at its end");
    let before = job.output().len();
    job.wait_for_output(TRAINING, |text| last_pass(&text[before..]) >= 8);
    drop(job);
    let outcome = training(&traces, 2, &["--repeats", "3", "--resume-from", "auto"]).run(TRAINING);
    outcome.expect_code(0);
    assert!(outcome.stdout.contains("run 1 is done: "), "{}", outcome.transcript());
    traces.assert_same_end(&undisturbed, &SAME, &outcome.transcript());
    // A program without such a run.
    let launcher = Program::ice_launch(["--devices", "cpu:0", "--run-id", "folds"]);
    let outcome = traces.trainee(launcher, 3).args(["--resume-from", "latest"]).run(TRAINING);
    outcome.expect_code(2).expect_in_stderr(&["the checkpoint is of run 2", "this program has 1"]);
}

#[test]
fn job_that_is_stopped_in_the_first_run_does_not_begin_the_second() {
    let traces = Traces::new();
    let job = training(&traces, 1, &["--repeats", "4000"]).start();
    job.wait_for_output(TRAINING, |text| last_pass(text) >= 8);
    job.signal(Signal::TERM);
    let outcome = job.finish(TRAINING);
    outcome.expect_code(128 + 15);
    assert!(!outcome.stdout.contains("is at its end"), "{}", outcome.transcript());
    let seen = std::fs::read_dir(traces.path("seen")).unwrap().count();
    assert_eq!(seen, 2, "a file of each rank");
}

/// The program launches one job, whose ranks do all runs.
#[test]
fn program_with_two_runs_launches_itself_once() {
    let traces = Traces::new();
    let program = Program::new(crate::support::built("trainee")).args(["--devices", "cpu:0"]);
    let (seen, out) = (traces.path("seen"), traces.path("out"));
    let program = program.args(["--seen", &seen, "--life", "1", "--out-dir", &out]);
    let outcome = program.args(["--runs", "2", "--repeats", "1"]).run(TRAINING);
    outcome.expect_code(0);
    let ends = outcome.stdout.lines().filter(|line| line.ends_with("is at its end"));
    assert_eq!(ends.collect::<Vec<_>>(), ["run 1 is at its end", "run 2 is at its end"]);
}
