//! Failing ranks: the report names them, the other ranks are stopped, the exit code is the
//! documented one, and no process is left.

use std::fs;
use std::path::Path;

use ice_proto::exit::ExitCode;
use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

use crate::support::{Finished, Program, SOON, TRAINING, Traces, built, free_port, shell_script};

/// Two ranks that run `body` and record their process ids. Logs go to a folder of the test.
struct TwoRanks {
    folder: TempDir,
    outcome: Finished,
}

impl TwoRanks {
    fn run(body: &str) -> Self {
        Self::run_with(&[], body)
    }

    fn run_with(options: &[&str], body: &str) -> Self {
        let folder = tempdir().unwrap();
        let script = shell_script(
            folder.path(),
            "program",
            &format!("echo $$ > {}/pid.$RANK.$TORCHELASTIC_RESTART_COUNT\n{body}", folder.path().display()),
        );
        let outcome = Program::ice_launch(["--devices", "cpu:0-1", "--log-dir"])
            .arg(folder.path().join("logs"))
            .args(options)
            .arg(script)
            .run(SOON);
        Self { folder, outcome }
    }

    fn pid(&self, rank: u32) -> String {
        read(self.folder.path(), &format!("pid.{rank}.0"))
    }
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}")).trim().to_owned()
}

/// Script of the other rank, which runs until it is stopped.
const STAY: &str = "exec sleep 600";

/// Checks the report of the failure: the kind of end, node and rank, and the last line of stderr.
#[track_caller]
fn check_report(outcome: &Finished, rank: u32, ended: &str, pid: Option<&str>, last_words: &str) {
    outcome.expect_in_stderr(&[&format!("ice-launch: rank {rank} failed: {ended}")]);
    assert!(outcome.report("node").starts_with("0 ("), "{}", outcome.transcript());
    assert!(
        outcome.report("rank").starts_with(&format!("{rank} (local rank {rank})")),
        "{}",
        outcome.transcript()
    );
    if let Some(pid) = pid {
        assert!(outcome.report("rank").ends_with(&format!("pid {pid}")), "{}", outcome.transcript());
    }
    let mut said = outcome.stderr.lines().skip_while(|line| !line.trim_start().starts_with("stderr "));
    assert!(
        said.any(|line| line.contains(last_words)),
        "`{last_words}` is missing in {}",
        outcome.transcript()
    );
}

#[test]
fn a_rank_that_exits_3() {
    let ranks = TwoRanks::run(&format!("[ $RANK = 0 ] && {STAY}\necho 'out of paper' >&2\nexit 3"));
    check_report(ranks.outcome.expect_code(3), 1, "exit code 3", Some(&ranks.pid(1)), "out of paper");
    assert_eq!(ranks.outcome.report("stopped"), "rank 0");
}

#[test]
fn a_rank_that_is_killed() {
    let ranks = TwoRanks::run(&format!("[ $RANK = 1 ] && {STAY}\necho 'the last words' >&2\nkill -KILL $$"));
    let code = ExitCode::Signal(9).code();
    let outcome = ranks.outcome.expect_code(code.into());
    check_report(outcome, 0, "killed by SIGKILL", Some(&ranks.pid(0)), "the last words");
}

#[test]
fn a_rank_that_panics() {
    let outcome =
        Program::ice_launch(["--devices", "cpu:0-1"]).arg(built("rank")).args(["panic", "1"]).run(SOON);
    check_report(outcome.expect_code(101), 1, "exit code 101", None, "rank 1 was told to panic");
}

#[test]
fn the_report_names_the_log_files() {
    let fails = "[ $RANK = 0 ] || { echo 'into the file' >&2; exit 4; }";
    let ranks = TwoRanks::run_with(&["--redirects", "3"], fails);
    check_report(ranks.outcome.expect_code(4), 1, "exit code 4", Some(&ranks.pid(1)), "into the file");
    let logs = Path::new(ranks.outcome.report("logs"));
    assert!(logs.starts_with(ranks.folder.path().join("logs")), "{logs:?}");
    assert_eq!(read(logs, "stderr.log"), "into the file");
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    let ranks = TwoRanks::run_with(
        &["--shutdown-timeout", "1"],
        "if [ $RANK = 0 ]; then trap '' TERM; while :; do sleep 600; done; fi\nexit 5",
    );
    ranks.outcome.expect_code(5);
}

#[test]
fn what_a_rank_started_is_stopped_with_it() {
    let ranks = TwoRanks::run(&format!("[ $RANK = 1 ] && exit 6\nsleep 600 &\n{STAY}"));
    ranks.outcome.expect_code(6);
}

#[track_caller]
fn check_not_started(program: &Path, why: &str) {
    let outcome = Program::ice_launch(["--devices", "cpu:0-1"]).arg(program).run(SOON);
    outcome.expect_code(ExitCode::NotExecutable.code().into());
    outcome.expect_in_stderr(&["ice-launch: rank 0 failed: not started", program.to_str().unwrap(), why]);
    assert!(outcome.report("node").starts_with("0 ("), "{}", outcome.transcript());
}

#[test]
fn a_program_that_is_not_executable() {
    let folder = tempdir().unwrap();
    let program = folder.path().join("notes.txt");
    fs::write(&program, "not a program\n").unwrap();
    check_not_started(&program, "Permission denied");
}

#[test]
fn a_program_whose_interpreter_is_missing() {
    let folder = tempdir().unwrap();
    let program = shell_script(folder.path(), "program", "");
    fs::write(&program, "#!/no/such/interpreter\n").unwrap();
    check_not_started(&program, "No such file");
}

#[test]
fn a_failure_restarts_all_ranks_as_often_as_allowed() {
    // Rank 1 fails only after rank 0 has recorded its process id, since rank 0 is stopped then.
    let fails = "until [ -s \"${0%/*}/pid.0.$TORCHELASTIC_RESTART_COUNT\" ]; do sleep 0.02; done; exit 7";
    let body = format!("[ $RANK = 0 ] || {{ {fails}; }}\n{STAY}");
    let ranks = TwoRanks::run_with(&["--max-restarts", "2"], &body);
    ranks.outcome.expect_code(7);
    for attempt in 0..=2 {
        for rank in 0..=1 {
            read(ranks.folder.path(), &format!("pid.{rank}.{attempt}"));
        }
    }
    assert!(!ranks.folder.path().join("pid.0.3").exists());
}

#[test]
fn a_restart_that_helps_ends_well() {
    let body = "[ $RANK = 0 ] || [ $TORCHELASTIC_RESTART_COUNT = 1 ] || exit 8\nexit 0";
    TwoRanks::run_with(&["--max-restarts", "1"], body).outcome.expect_code(0);
}

#[test]
fn sigterm_to_the_launcher_stops_the_ranks() {
    let job = Program::ice_launch(["--devices", "cpu:0-1"]).arg(built("rank")).arg("wait").start();
    job.wait_for_line(SOON, |line| line.contains("waiting"));
    assert_eq!(job.others().len(), 2, "{:?}", job.others());
    job.signal(Signal::TERM);
    job.finish(SOON).expect_code(ExitCode::Signal(15).code().into());
}

#[test]
fn the_ranks_do_not_outlive_a_killed_launcher() {
    for program in [built("rank").to_owned(), "sh".into()] {
        let arguments = match program.ends_with("rank") {
            true => vec!["wait"],
            false => vec!["-c", "echo waiting; exec sleep 600"],
        };
        let job = Program::ice_launch(["--devices", "cpu:0-1"]).arg(&program).args(arguments).start();
        job.wait_for_line(SOON, |line| line.contains("waiting"));
        job.signal(Signal::KILL);
        // `finish` fails if a rank is left.
        assert_eq!(job.finish(SOON).signal, Some(Signal::KILL.as_raw()), "{program:?}");
    }
}

#[test]
fn a_failure_on_one_node_ends_the_other() {
    let folder = tempdir().unwrap();
    let script = shell_script(
        folder.path(),
        "program",
        "[ $RANK = 1 ] && { echo 'lost it' >&2; exit 9; }\nexec sleep 600",
    );
    let port = free_port().to_string();
    let agent = |node: &str| {
        Program::ice_launch(["--nnodes", "2", "--master-addr", "127.0.0.1", "--devices", "cpu:0"])
            .args(["--master-port", &port, "--node-rank", node])
            .arg(&script)
            .start()
    };
    let (first, second) = (agent("0"), agent("1"));
    let (first, second) = (first.finish(SOON), second.finish(SOON));
    second.expect_code(9).expect_in_stderr(&["ice-launch: rank 1 failed: exit code 9", "    lost it"]);
    assert!(second.report("node").starts_with("1 ("), "{}", second.transcript());
    // The other node has no exit code of a rank to propagate. Its message names the node and the
    // rank that failed.
    first.expect_code(ExitCode::Failure.code().into()).expect_in_stderr(&[
        "the job is over",
        "node 1",
        "exit code 9",
    ]);
}

/// systemd's unit in the book does not start a job again after exit code 2.
#[test]
fn file_that_is_missing_is_usage_error_before_the_first_step_and_failure_later() {
    let missing = "/nowhere/checkpoint";
    for (option, code) in [("--resume-from", ExitCode::Usage), ("--loads", ExitCode::Failure)] {
        let traces = Traces::new();
        let launcher = Program::ice_launch(["--devices", "cpu:0"]);
        let training = traces.trainee(launcher, 1).args(["--repeats", "1", option, missing]);
        training.run(TRAINING).expect_code(code.code().into()).expect_in_stderr(&[missing]);
        assert_eq!(traces.passes().is_empty(), option == "--resume-from");
    }
}

/// A restarted rank counts its epochs from 0. The other ranks must not wait for it forever.
#[test]
fn run_ended_by_a_closure_of_one_rank_ends_on_all_at_the_same_step() {
    for lost in ["0", "1"] {
        let traces = Traces::new();
        let launcher = Program::ice_launch(["--devices", "cpu:0-1", "--max-restarts", "1"]);
        let training = traces.trainee(launcher, 1).args(["--end-after", "4", "--dies", lost]);
        let outcome = training.run(TRAINING);
        outcome.expect_code(0).expect_in_stderr(&["did not ask for it"]);
        let last =
            |rank| traces.passes().iter().filter(|pass| pass.rank == rank).map(|pass| pass.number).max();
        assert_eq!(last(0), last(1), "{}", outcome.transcript());
        // An evaluation at the start of each turn, and two more during the turn.
        let turns = outcome.stdout.lines().filter(|line| line.starts_with("val epoch")).count() / 3;
        assert_eq!(turns, 4, "{}", outcome.transcript());
    }
}
