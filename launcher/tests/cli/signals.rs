//! Signals to the launcher.

use rustix::process::Signal;

use crate::support::{Gate, Job, launch, wait_for_state};
use crate::{STAY, TWO};

#[test]
fn ranks_do_not_outlive_a_killed_launcher() {
    let mut job = Job::start(launch(&TWO, &format!("echo ready; {STAY}")));
    job.expect_line("ready");
    job.expect_line("ready");
    job.signal(Signal::KILL);
    assert_eq!(job.finish().signal, Some(Signal::KILL.as_raw()));
}

#[test]
fn a_signal_stops_the_ranks() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let mut job = Job::start(launch(&TWO, &format!("echo ready; {STAY}")));
        job.expect_line("ready");
        job.expect_line("ready");
        job.signal(signal);
        job.finish().expect(code, &["told to stop by SIG"]);
    }
}

#[test]
fn interrupt_after_terminate_kills_ranks_that_do_not_end() {
    let script = "trap 'echo asked' TERM; echo ready; while :; do sleep 600 & wait $!; done";
    let mut job = Job::start(launch(&["--devices", "cpu", "--shutdown-timeout", "600"], script));
    job.expect_line("ready");
    job.signal(Signal::TERM);
    job.expect_line("asked");
    job.signal_until_it_ends(Signal::INT);
    job.finish().expect(143, &["killing"]);
}

#[test]
fn repeated_terminate_does_not_cut_off_a_save() {
    // The rank saves for as long as the gate is closed.
    let script = "
        trap 'echo saving; read -r go < $GATE; echo saved; exit 0' TERM
        echo ready; while :; do sleep 600 & wait $!; done";
    for signal in [Signal::TERM, Signal::HUP] {
        let mut command = launch(&["--devices", "cpu", "--shutdown-timeout", "600"], script);
        let gate = Gate::new(&mut command);
        let mut job = Job::start_unread(command);
        job.expect_line("ready");
        job.signal(Signal::TERM);
        job.expect_line("saving");
        // A signal shortly after the first one counts as its repetition, and is not reported. The
        // test therefore signals until a report appears.
        job.signal_until_said(signal, "told to stop again by SIG");
        job.read_stderr();
        gate.open();
        job.expect_line("saved");
        job.finish().expect(143, &[]);
    }
}

#[test]
fn ranks_that_do_not_end_are_killed_after_the_shutdown_timeout() {
    let script = "trap '' TERM; echo ready; while :; do sleep 600; done";
    let mut job = Job::start(launch(&["--devices", "cpu", "--shutdown-timeout", "0.2"], script));
    job.expect_line("ready");
    job.signal(Signal::TERM);
    job.finish().expect(143, &["shutdown timeout"]);
}

#[test]
fn the_signal_itself_reaches_the_ranks() {
    let script = "trap 'echo interrupted; exit 0' INT; echo ready; while :; do sleep 600 & wait $!; done";
    let mut job = Job::start(launch(&["--devices", "cpu"], script));
    job.expect_line("ready");
    job.signal(Signal::INT);
    job.expect_line("interrupted");
    job.finish().expect(130, &["told to stop by SIGINT"]);
}

#[test]
fn signals_to_handle_are_those_that_stop() {
    let script = "trap 'echo got usr1; exit 0' USR1; echo ready; while :; do sleep 600 & wait $!; done";
    let options = ["--devices", "cpu", "--signals-to-handle", "SIGTERM,usr1"];
    let mut job = Job::start(launch(&options, script));
    job.expect_line("ready");
    job.signal(Signal::USR1);
    job.expect_line("got usr1");
    job.finish().expect(138, &["told to stop by SIGUSR1"]);
}

#[test]
fn user_signals_are_passed_on_to_ranks_that_handle_them() {
    let script = "
        [ $RANK = 0 ] && { echo ready; read -r go < $GATE; exit 0; }
        trap 'echo saved; exit 0' USR2; echo ready; while :; do sleep 600 & wait $!; done";
    let mut command = launch(&TWO, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("ready");
    job.expect_line("ready");
    job.signal(Signal::USR2);
    job.expect_line("saved");
    gate.open();
    job.finish().expect(0, &["SIGUSR2 was not passed on to rank 0"]);
}

#[test]
fn a_job_in_the_background_keeps_ignoring_what_it_was_started_to_ignore() {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
    let script = "echo ready; read -r go < $GATE; echo went on";
    let inner = launch(&["--devices", "cpu"], script);
    command.arg(inner.get_program()).args(inner.get_args());
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("ready");
    job.signal(Signal::HUP);
    gate.open();
    job.expect_line("went on");
    job.finish().expect(0, &[]);
}

#[test]
fn a_job_that_is_suspended_goes_on() {
    let script = "echo \"rank $$\"; read -r go < $GATE; echo went on";
    let mut command = launch(&["--devices", "cpu"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    let rank = job.expect_line("rank ");
    job.signal(Signal::TSTP);
    wait_for_state(&rank, 'T');
    wait_for_state(&job.pid().to_string(), 'T');
    job.signal(Signal::CONT);
    wait_for_state(&rank, 'S');
    gate.open();
    job.finish().expect(0, &[]);
}
