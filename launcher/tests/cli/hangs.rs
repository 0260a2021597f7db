//! Jobs that hang. The end-to-end tests cover ranks that report their steps.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use tempfile::tempdir;

use crate::support::{Gate, Job, executable, ice_launch, launch, run};

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
    let stacks = fs::read_to_string(logs).unwrap();
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
    // A shell named `python` that runs the script as a shell script.
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

#[test]
fn a_rank_that_spins_is_found_by_its_heartbeat_file() {
    let script = "[ $RANK = 0 ] || exec sleep 600; touch \"$ICE_HEARTBEAT_FILE\"; while :; do :; done";
    let outcome = run(launch(&OPTIONS, script));
    outcome.expect(1, &["rank 0 failed: hung: it did not touch its heartbeat file for 0.3 s; stacks"]);
}

#[test]
fn the_heartbeat_file_is_made_by_the_rank() {
    let script = "[ ! -e \"$ICE_HEARTBEAT_FILE\" ] && touch \"$ICE_HEARTBEAT_FILE\"";
    run(launch(&["--devices", "cpu:0-1"], script)).expect(0, &[]);
}

/// Returns a job of two ranks that may set timers with `timer SCOPE EXPIRATION SIGNAL`. A timer
/// with the expiration 1 expires at once.
fn with_timers(options: &[&str], script: &str) -> Command {
    let timer = r#"timer() { printf '{"version": 1, "pid": %d, "scope_id": "%s", "expiration_time": %s, "signal": %d}\n' $$ "$@" > "$TORCHELASTIC_TIMER_FILE"; }"#;
    let options = [&["--devices", "cpu:0-1"], options].concat();
    let mut command = launch(&options, &format!("{timer}\n{script}"));
    command.env("TORCHELASTIC_ENABLE_FILE_TIMER", "1");
    command
}

#[test]
fn a_timer_that_is_not_released_ends_its_rank_by_its_signal() {
    // Rank 1 ignores SIGTERM.
    let script = "
        trap '' TERM; [ $RANK = 0 ] && trap - TERM
        timer released 1e12 9; timer released -1 0; timer later 1e12 9
        [ $RANK = 0 ] || timer 'step 7' 1 9
        while :; do :; done";
    let outcome = run(with_timers(&["--shutdown-timeout", "600"], script));
    outcome.expect(1, &["rank 1 failed: hung: it did not release its timer `step 7` in time; stacks"]);
}

#[test]
fn a_timer_that_expires_is_answered_with_a_restart() {
    let script = "[ $TORCHELASTIC_RESTART_COUNT = 1 ] || { timer a 1 15; exec sleep 600; }";
    let outcome = run(with_timers(&["--max-restarts", "1"], script));
    outcome.expect(0, &["hangs: it did not release its timer `a` in time", "restart 1 of 1"]);
}

#[test]
fn what_is_no_request_of_a_rank_ends_nothing() {
    let script = "
        [ $RANK = 0 ] || exit 0
        echo nonsense > \"$TORCHELASTIC_TIMER_FILE\"
        head -c 100000 /dev/zero > \"$TORCHELASTIC_TIMER_FILE\"; echo > \"$TORCHELASTIC_TIMER_FILE\"
        echo '{\"pid\": 1, \"scope_id\": \"init\", \"expiration_time\": 1, \"signal\": 9}' > \"$TORCHELASTIC_TIMER_FILE\"
        timer 'no signal' 1 0
        read -r go < $GATE";
    let mut command = with_timers(&[], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    let said = job.expect_error(
        "rank 0: it did not release its timer `no signal` in time; the timer has no signal, so the rank is left alone",
    );
    assert!(said.contains("a timer of process 1 is ignored: it belongs to no rank of this node"), "{said}");
    job.read_stderr();
    gate.open();
    job.finish().expect(0, &[]);
}

#[test]
fn the_pipe_for_timers_is_where_it_is_wanted_unless_something_else_is() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("timers");
    let launch = || {
        let mut command =
            with_timers(&[], "[ -p \"$TORCHELASTIC_TIMER_FILE\" ] && echo \"at $TORCHELASTIC_TIMER_FILE\"");
        command.env("TORCHELASTIC_TIMER_FILE", &path);
        command
    };
    let outcome = run(launch());
    assert_eq!(
        outcome.expect(0, &[]).stdout,
        [format!("at {}", path.display()), format!("at {}", path.display())]
    );
    assert!(!path.exists(), "it is removed");
    fs::write(&path, "precious").unwrap();
    run(launch())
        .expect(2, &["TORCHELASTIC_TIMER_FILE: cannot make the pipe", "there is something else than a pipe"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}
