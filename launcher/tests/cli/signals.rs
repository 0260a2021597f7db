//! Signals to the launcher.

use rustix::process::Signal;

use crate::support::{Job, launch};
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
fn a_second_signal_kills_ranks_that_do_not_end() {
    let script = "trap 'echo asked' TERM; echo ready; while :; do sleep 600 & wait $!; done";
    let mut job = Job::start(launch(&["--devices", "cpu", "--shutdown-timeout", "600"], script));
    job.expect_line("ready");
    job.signal(Signal::TERM);
    job.expect_line("asked");
    job.signal(Signal::TERM);
    job.finish().expect(143, &["killing"]);
}

#[test]
fn ranks_that_do_not_end_are_killed_after_the_shutdown_timeout() {
    let script = "trap '' TERM; echo ready; while :; do sleep 600; done";
    let mut job = Job::start(launch(&["--devices", "cpu", "--shutdown-timeout", "0.2"], script));
    job.expect_line("ready");
    job.signal(Signal::TERM);
    job.finish().expect(143, &["shutdown timeout"]);
}
