//! Jobs that stand still. Ranks that report their steps are in the end-to-end tests.

use crate::support::{Job, launch, run};

const OPTIONS: [&str; 4] = ["--devices", "cpu:0-1", "--hang-timeout", "0.3"];

#[test]
fn ranks_that_do_nothing_have_failed() {
    let mut job = Job::start(launch(&OPTIONS, "echo \"$RANK pid $$\"; exec sleep 600"));
    let pid = job.expect_line("0 pid ");
    let outcome = job.finish();
    let said =
        ["no rank used the CPU for 0.3 s", "stacks of all ranks were written (threads", "hung: no rank"];
    outcome.expect(1, &said);
    let logs = outcome.stderr.lines().find_map(|line| line.strip_prefix("  logs     ")).unwrap();
    assert!(logs.ends_with("stacks.txt"), "{logs}");
    let stacks = std::fs::read_to_string(logs).unwrap();
    let of_root = outcome.stderr.contains(&format!("pid {pid}"));
    assert!(!of_root || stacks.contains(&format!("process {pid}\n")), "{stacks}");
    assert!(stacks.contains("sleep: S (sleeping)"), "{stacks}");
}

#[test]
fn a_hang_is_answered_with_a_restart() {
    let script = "[ $TORCHELASTIC_RESTART_COUNT = 1 ] || exec sleep 600";
    let options = [&OPTIONS[..], &["--max-restarts", "1"]].concat();
    run(launch(&options, script)).expect(0, &["hangs: no rank used the CPU", "restart 1 of 1"]);
}

#[test]
fn ranks_that_work_go_on() {
    // One rank waits for the other, which is busy for longer than the timeout.
    let script = "
        [ $RANK = 0 ] || exec sleep 1
        end=$(($(date +%s%N) + 900000000)); while [ $(date +%s%N) -lt $end ]; do :; done";
    run(launch(&OPTIONS, script)).expect(0, &[]);
}
