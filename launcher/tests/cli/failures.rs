//! Effects of failures.

use std::fs;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempdir;

use crate::support::{Gate, Job, executable, ice_launch, launch, lives, run};
use crate::{STAY, TWO};

#[test]
fn a_failed_rank_is_reported_and_its_code_passes_through() {
    let script = format!("echo \"$RANK pid $$\"; [ $RANK = 1 ] || {STAY}; echo 'out of paper' >&2; exit 3");
    let mut job = Job::start(launch(&TWO, &script));
    let pid = job.expect_line("1 pid ");
    job.finish().expect(
        3,
        &[
            "ice-launch: rank 1 failed: exit code 3",
            &format!("1 (local rank 1), pid {pid}"),
            "    out of paper",
            "stopped  rank 0",
        ],
    );
}

#[test]
fn the_error_file_is_in_the_report() {
    let text = r#"{"message": {"message": "ValueError: no such colour", "extraInfo": {}}}"#;
    let script = format!("echo '{text}' > $TORCHELASTIC_ERROR_FILE; exit 1");
    run(launch(&["--devices", "cpu"], &script)).expect(1, &["error    ValueError: no such colour"]);
}

#[test]
fn a_killed_rank_is_told_by_its_signal() {
    let script = format!("[ $RANK = 0 ] || {STAY}; kill -KILL $$");
    run(launch(&TWO, &script)).expect(137, &["rank 0 failed: killed by SIGKILL"]);
}

#[test]
fn a_program_that_cannot_be_executed_ends_with_126() {
    let folder = tempdir().unwrap();
    let program = folder.path().join("notes.txt");
    fs::write(&program, "not a program").unwrap();
    let mut command = ice_launch();
    command.args(["--devices", "cpu"]).arg(&program);
    run(command).expect(126, &["rank 0 failed: not started", program.to_str().unwrap()]);
    executable(&program, "#!/no/such/interpreter\n");
    let mut command = ice_launch();
    command.args(["--devices", "cpu"]).arg(&program);
    run(command).expect(126, &["rank 0 failed: not started", program.to_str().unwrap()]);
}

#[test]
fn a_restart_that_helps_ends_well() {
    let script = "echo \"attempt $TORCHELASTIC_RESTART_COUNT\"; [ $TORCHELASTIC_RESTART_COUNT = 1 ]";
    let outcome = run(launch(&[&TWO[..], &["--max-restarts", "1"]].concat(), script));
    outcome.expect(0, &["restart 1 of 1"]);
    assert_eq!(outcome.stdout.iter().filter(|line| *line == "attempt 1").count(), 2, "{outcome:#?}");
}

#[test]
fn what_an_attempt_left_behind_does_not_meet_the_next() {
    let script = "
        if [ $TORCHELASTIC_RESTART_COUNT = 1 ]; then echo again; read -r go < $GATE; exit 0; fi
        setsid sh -c 'echo \"sleeper $$\"; exec sleep 600' & read -r go < $GATE; exit 4";
    let mut command = launch(&["--devices", "cpu", "--max-restarts", "1"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    let sleeper = job.expect_line("sleeper ");
    gate.open();
    job.expect_line("again");
    assert!(!lives(&sleeper), "it meets the second attempt");
    gate.open();
    job.finish().expect(0, &[]);
}

#[test]
fn a_grandchild_in_a_session_of_its_own_is_ended() {
    // The sleeper also holds the pipe of stderr.
    let script = "
        [ $RANK = 0 ] || exec sleep 600
        setsid sh -c 'echo \"sleeper $$\"; exec sleep 600' & read -r go < $GATE; echo 'last words' >&2; exit 5";
    let mut command = launch(&TWO, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("sleeper ");
    gate.open();
    job.finish().expect(5, &["rank 0 failed: exit code 5", "    last words"]);
}

#[test]
fn children_that_no_rank_started_are_left_alone() {
    let mut command = Command::new("sh");
    command.args(["-c", "sleep 600 & echo \"sleeper $!\"; exec \"$@\"", "sh"]);
    let inner = launch(&["--devices", "cpu"], "exit 0");
    command.arg(inner.get_program()).args(inner.get_args());
    let mut job = Job::start(command);
    let sleeper = job.expect_line("sleeper ");
    // The sleeper holds the outputs open, so their end does not tell that the launcher has ended.
    job.wait();
    assert!(lives(&sleeper), "a child that was there before the launcher was killed");
    let pid = Pid::from_raw(sleeper.parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    job.finish().expect(0, &[]);
}
