//! Failures that lead to a restart, and failures that do not.

use crate::support::{launch, run};

const ONE: [&str; 2] = ["--devices", "cpu"];

/// Returns the number of times that the program ran.
fn attempts(options: &[&str], script: &str, code: i32, said: &[&str]) -> usize {
    let outcome = run(launch(&[&ONE, options].concat(), &format!("echo attempt; {script}")));
    outcome.expect(code, said);
    outcome.stdout.iter().filter(|line| *line == "attempt").count()
}

#[test]
fn restarts_are_counted_and_each_is_explained() {
    let said = ["restart 1 of 2", "restart 2 of 2", "no restart: all 2 restarts are used up"];
    assert_eq!(attempts(&["--max-restarts", "2", "--restart-backoff", "0"], "exit 3", 3, &said), 3);
    assert_eq!(attempts(&[], "exit 3", 3, &["rank 0 failed: exit code 3"]), 1);
}

#[test]
fn a_crash_loop_ends_early() {
    let options = ["--max-restarts", "50", "--crash-loop-limit", "3", "--restart-backoff", "0"];
    assert_eq!(attempts(&options, "exit 7", 7, &["no restart: 3 attempts in a row"]), 3);
}

#[test]
fn a_pause_comes_before_the_second_restart_in_a_row() {
    let options = ["--max-restarts", "2", "--restart-backoff", "0.05"];
    assert_eq!(attempts(&options, "exit 7", 7, &["restart 2 of 2, after a pause of 0.05 s"]), 3);
}

#[test]
fn fatal_exit_codes_are_not_tried_again() {
    let options = ["--max-restarts", "5", "--fatal-exit-codes", "2,64-78"];
    assert_eq!(attempts(&options, "exit 65", 65, &["no restart: exit code 65 is final"]), 1);
}

#[test]
fn a_window_forgets_old_failures() {
    // When a failure comes, the previous one is already older than the window.
    let script = "sleep 0.02; [ $TORCHELASTIC_RESTART_COUNT = 4 ]";
    let options = ["--max-restarts", "1", "--restart-window", "0.01", "--restart-backoff", "0"];
    assert_eq!(attempts(&options, script, 0, &["restart 1 of 1 within 0.01 s"]), 5);
}

#[test]
fn a_program_that_cannot_be_started_is_not_tried_again() {
    let mut command = crate::support::ice_launch();
    command.args(["--devices", "cpu", "--max-restarts", "3", "/etc/passwd"]);
    run(command).expect(126, &["no restart: the program cannot be started"]);
}
