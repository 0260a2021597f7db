//! The binary from outside, with shells as ranks: what they are told, what becomes of failures, and that nothing is left behind.
//! Every test ends with a search for processes that came of its job.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempdir;

mod support;

use support::{Gate, Job, executable, free_port, ice_launch, launch, lives, run};

const TWO: [&str; 2] = ["--devices", "cpu:0-1"];
/// What a rank does that is to be stopped.
const STAY: &str = "exec sleep 600";

fn node<'a>(rank: &'a str, port: &'a str) -> Vec<&'a str> {
    vec!["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", port]
}

#[test]
fn ranks_find_the_contract_in_their_environment() {
    let folder = tempdir().unwrap();
    let script = "env > $OUT/$RANK";
    let mut command = launch(&[&TWO[..], &["--role", "trainer", "--run-id", "digits"]].concat(), script);
    command.env("OUT", folder.path());
    let outcome = run(command);
    assert_eq!(outcome.expect(0, &[]).stderr, "");
    let threads = (std::thread::available_parallelism().unwrap().get() / 2).max(1).to_string();
    for rank in ["0", "1"] {
        let text = fs::read_to_string(folder.path().join(rank)).unwrap();
        let value = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_else(|| panic!("{name} is missing in {text}")).to_owned()
        };
        for (name, expected) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("ROLE_RANK", rank),
            ("GROUP_RANK", "0"),
            ("ROLE_NAME", "trainer"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "0"),
            ("TORCHELASTIC_RUN_ID", "digits"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            ("OMP_NUM_THREADS", &threads),
            ("ICE_DEVICE", "cpu"),
            ("ICE_DIST_BACKEND", "gloo"),
            ("ICE_ROUND", "0"),
        ] {
            assert_eq!(value(name), expected, "{name}");
        }
        assert!(value("MASTER_PORT").parse::<u16>().unwrap() > 0);
        assert!(value("TORCHELASTIC_ERROR_FILE").ends_with(&format!("/attempt_0/{rank}/error.json")));
        assert!(value("ICE_LINK_FD").parse::<i32>().unwrap() > 2);
        assert!(!text.contains("PYTHONUNBUFFERED=") || std::env::var_os("PYTHONUNBUFFERED").is_some());
    }
}

#[test]
fn every_variable_of_the_contract_is_set() {
    let outcome = run(launch(&TWO, "[ $RANK = 0 ] || exit 0; env"));
    for (name, _) in ice_proto::env::ALL {
        let set = outcome.stdout.iter().any(|line| line.starts_with(&format!("{name}=")));
        assert!(set, "{name} is missing: {outcome:#?}");
    }
}

#[test]
fn one_rank_keeps_its_threads() {
    let outcome = run(launch(&["--devices", "cpu"], "echo \"[$OMP_NUM_THREADS]\""));
    assert_eq!((outcome.stdout, outcome.stderr), (vec!["[]".to_owned()], String::new()));
}

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
            "stopped  ranks 0",
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
    // It holds the pipe of stderr, too.
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
    // The sleeper holds the outputs open, so the end is not to be told by them.
    job.wait();
    assert!(lives(&sleeper), "a child that was there before the launcher was killed");
    let pid = Pid::from_raw(sleeper.parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    job.finish().expect(0, &[]);
}

#[test]
fn two_nodes_are_one_job() {
    let port = free_port();
    let script = "echo \"rank $RANK of $WORLD_SIZE on node $GROUP_RANK of $GROUP_WORLD_SIZE\"";
    let [second, first] = ["1", "0"].map(|rank| Job::start(launch(&node(rank, &port), script)));
    let (first, second) = (first.finish(), second.finish());
    assert_eq!(first.expect(0, &[]).stdout, ["rank 0 of 2 on node 0 of 2"]);
    assert_eq!(second.expect(0, &[]).stdout, ["rank 1 of 2 on node 1 of 2"]);
}

#[test]
fn a_failure_on_one_node_ends_the_other() {
    let port = free_port();
    let script = format!("[ $RANK = 1 ] || {STAY}; exit 9");
    let [first, second] = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
    first.finish().expect(1, &["the job is over", "node 1", "exit code 9"]);
    second.finish().expect(9, &["rank 1 failed: exit code 9"]);
}

#[test]
fn a_lost_agent_ends_the_other_with_a_reason() {
    for (lost, reason) in [(0, "lost the coordinator at 127.0.0.1:"), (1, "lost node 1")] {
        let port = free_port();
        let script = format!("echo ready; {STAY}");
        let mut jobs = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
        jobs.iter_mut().for_each(|job| _ = job.expect_line("ready"));
        jobs[lost].signal(Signal::KILL);
        let [first, second] = jobs.map(Job::finish);
        let (lost, other) = if lost == 0 { (first, second) } else { (second, first) };
        assert_eq!(lost.signal, Some(Signal::KILL.as_raw()), "{lost:#?}");
        other.expect(1, &[reason]);
    }
}

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

#[test]
fn usage_errors_end_with_2_before_anything_is_started() {
    for (options, words) in [
        (&["--devices", "tpu"][..], &["--devices", "`tpu`", "cuda:0-2,7"][..]),
        (&["--devices", "cpu:2-1"], &["--devices", "`2-1`"]),
        (&["--devices", "cpu", "--nnodes", "0"], &["--nnodes", "`0`"]),
        (&["--devices", "cpu", "--nnodes", "2"], &["--node-rank"]),
        (&["--devices", "cpu", "--tee", "4"], &["--tee", "`4`"]),
        (&["--devices", "cpu", "--dist-backend", "mpi"], &["--dist-backend", "`mpi`"]),
        (&["--devises", "cpu"], &["--devices"]),
    ] {
        let outcome = run(launch(options, "echo started"));
        assert!(outcome.expect(2, words).stdout.is_empty(), "{outcome:#?}");
    }
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "no-such-program-anywhere"]);
    run(command).expect(2, &["`no-such-program-anywhere`", "PATH"]);
}

#[test]
fn a_gpu_that_is_not_there_is_a_usage_error() {
    let mut command = launch(&["--devices", "cuda:4095"], "echo started");
    command.env("CUDA_VISIBLE_DEVICES", "0");
    assert!(run(command).expect(2, &["--devices", "cuda:4095", "this node has"]).stdout.is_empty());
}

#[test]
fn a_busy_port_is_a_usage_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let outcome = run(launch(&["--devices", "cpu", "--master-port", &port], "echo started"));
    assert!(outcome.expect(2, &[&port, "--master-port"]).stdout.is_empty());
}

#[test]
fn tee_writes_files_and_lines_with_their_rank() {
    let folder = tempdir().unwrap();
    let options = [&TWO[..], &["--tee", "3", "--log-dir", folder.path().to_str().unwrap()]].concat();
    let mut outcome = run(launch(&options, "echo out of $RANK; echo err of $RANK >&2"));
    outcome.expect(0, &["[default0]:err of 0\n", "[default1]:err of 1\n"]);
    outcome.stdout.sort();
    assert_eq!(outcome.stdout, ["[default0]:out of 0", "[default1]:out of 1"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert!(run.file_name().unwrap().to_str().unwrap().starts_with("none_"), "{run:?}");
    for rank in 0..2 {
        let read = |name| fs::read_to_string(run.join(format!("attempt_0/{rank}/{name}"))).unwrap();
        assert_eq!(read("stdout.log"), format!("out of {rank}\n"));
        assert_eq!(read("stderr.log"), format!("err of {rank}\n"));
    }
}

#[test]
fn redirects_go_to_files_alone_and_the_report_reads_them() {
    let folder = tempdir().unwrap();
    let options = [&TWO[..], &["-r", "1:3", "--log-dir", folder.path().to_str().unwrap()]].concat();
    let script = "
        echo out of $RANK; [ $RANK = 1 ] || exec sleep 600
        read -r go < $GATE; echo 'the reason' >&2; exit 6";
    let mut command = launch(&options, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("out of 0");
    gate.open();
    let outcome = job.finish();
    outcome.expect(6, &["    the reason"]);
    assert_eq!(outcome.stdout, ["out of 0"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read_to_string(run.join("attempt_0/1/stdout.log")).unwrap(), "out of 1\n");
    assert!(!run.join("attempt_0/0/stdout.log").exists());
}

#[test]
fn a_relative_log_folder_is_found_from_everywhere() {
    let folder = tempdir().unwrap();
    let text = r#"{"message": {"message": "lost my way", "extraInfo": {}}}"#;
    let script = format!("cd /; echo '{text}' > $TORCHELASTIC_ERROR_FILE; exit 1");
    let mut command = launch(&["--devices", "cpu", "--log-dir", "logs"], &script);
    command.current_dir(folder.path());
    run(command).expect(1, &["error    lost my way"]);
}

#[test]
fn a_temporary_folder_goes_after_success() {
    let folder = tempdir().unwrap();
    for (script, left) in [("exit 0", 0), ("exit 1", 1)] {
        let mut command = launch(&["--devices", "cpu"], script);
        command.env("TMPDIR", folder.path());
        run(command);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), left, "{script}");
    }
}

#[test]
fn a_closed_console_changes_nothing() {
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 1 ] && { echo again; exit 7; }
        echo ready; read -r go < $GATE; echo words >&2; exit 6";
    let mut command = launch(&["--devices", "cpu", "--max-restarts", "1"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    job.expect_line("ready");
    job.close_stderr();
    gate.open();
    job.expect_line("again");
    job.finish().expect(7, &[]);
}

#[test]
fn a_console_that_nobody_reads_holds_up_the_output_alone() {
    let script = "
        [ $RANK = 0 ] || { read -r go < $GATE; exit 5; }
        trap 'echo stopped; kill $!; exit 0' TERM
        head -c 4000000 /dev/zero >&2 & exec 2> /dev/null; echo ready; while :; do wait $!; done";
    let mut command = launch(&TWO, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    job.expect_line("ready");
    job.wait_until_stderr_is_full();
    gate.open();
    job.expect_line("stopped");
    job.read_stderr();
    job.finish().expect(5, &["rank 1 failed: exit code 5"]);
}
