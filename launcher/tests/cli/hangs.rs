//! Jobs that stand still. Ranks that report their steps are in the end-to-end tests.

use std::fs;
use std::os::unix::fs::symlink;

use tempfile::tempdir;

use crate::support::{Job, executable, ice_launch, launch, run};

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

#[test]
fn the_stacks_of_python_come_from_the_tool_beside_it() {
    let folder = tempdir().unwrap();
    let (python, script) = (folder.path().join("python"), folder.path().join("train.py"));
    // A shell that is called so, and does what a script of Python would do.
    symlink("/bin/bash", &python).unwrap();
    fs::write(&script, "[ $RANK = 0 ] || kill -STOP $$\nsleep 600 & wait\n").unwrap();
    executable(&folder.path().join("py-spy"), "#!/bin/sh\necho \"warning: noise\"; echo \"frames of $@\"\n");
    let mut command = ice_launch();
    command.args(OPTIONS).arg("--log-dir").arg(folder.path().join("logs")).arg(&script);
    command.env("PYTHON_EXEC", &python);
    let outcome = run(command);
    outcome.expect(1, &["stacks of all ranks were written (threads, "]);
    let run = fs::read_dir(folder.path().join("logs")).unwrap().next().unwrap().unwrap().path();
    let stacks =
        [0, 1].map(|rank| fs::read_to_string(run.join(format!("attempt_0/{rank}/stacks.txt"))).unwrap());
    let frames =
        stacks.each_ref().map(|text| text.lines().find(|line| line.starts_with("frames of dump --pid ")));
    assert!(frames[0].is_some_and(|line| !line.ends_with(" --nonblocking")), "{stacks:?}");
    assert!(frames[1].is_some_and(|line| line.ends_with(" --nonblocking")), "{stacks:?}");
    assert!(stacks.iter().all(|text| !text.contains("warning:")), "{stacks:?}");
}
