//! Wrong usage: exit code 2 and a message that names the value and the remedy, before a process is
//! started.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use ice_proto::exit::ExitCode;
use tempfile::{TempDir, tempdir};

use crate::support::{Finished, Program, SOON, built, free_port, mnist_data, shell_script};

/// A program that leaves a trace when it is started.
struct Tracer {
    folder: TempDir,
    program: PathBuf,
}

impl Tracer {
    fn new() -> Self {
        let folder = tempdir().unwrap();
        let program =
            shell_script(folder.path(), "tracer", &format!("touch {}/started", folder.path().display()));
        Self { folder, program }
    }

    fn was_started(&self) -> bool {
        self.folder.path().join("started").exists()
    }
}

/// Launches the tracer with these options, and expects a message with these words.
#[track_caller]
fn check(options: &[&str], words: &[&str]) {
    let tracer = Tracer::new();
    let outcome = Program::ice_launch(options).arg(&tracer.program).run(SOON);
    outcome.expect_code(ExitCode::Usage.code().into()).expect_in_stderr(words);
    assert_eq!(outcome.stdout, "", "usage errors go to standard error");
    assert!(!tracer.was_started(), "a rank was started: {}", outcome.transcript());
}

#[test]
fn the_tracer_leaves_a_trace() {
    let tracer = Tracer::new();
    Program::ice_launch(["--devices", "cpu"]).arg(&tracer.program).run(SOON).expect_code(0);
    assert!(tracer.was_started());
}

#[test]
fn unknown_device() {
    check(&["--devices", "tpu:0"], &["tpu", "--devices", "cuda"]);
}

#[test]
fn broken_device_list() {
    check(&["--devices", "cpu:0-"], &["cpu:0-", "--devices"]);
    check(&["--devices", "cpu:3-1"], &["3-1", "--devices"]);
}

#[test]
fn no_nodes() {
    check(&["--nnodes", "0", "--devices", "cpu"], &["--nnodes", "`0`", "at least 1"]);
}

#[test]
fn node_rank_out_of_range() {
    let port = free_port().to_string();
    let options = ["--nnodes", "2", "--node-rank", "2", "--master-port", &port, "--devices", "cpu"];
    check(&options, &["--node-rank", "2"]);
}

#[test]
fn busy_port() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    check(&["--master-port", &port, "--devices", "cpu"], &[&port, "--master-port", "in use"]);
}

#[test]
fn unknown_option() {
    check(&["--devises", "cpu"], &["--devises", "--devices"]);
}

#[test]
fn no_program() {
    let outcome = Program::ice_launch(["--devices", "cpu"]).run(SOON);
    outcome.expect_code(ExitCode::Usage.code().into()).expect_in_stderr(&["Usage"]);
}

#[test]
fn missing_program() {
    for (program, why) in [
        ("./no/such/program", "No such file"),
        ("./no/such/script.py", "No such file"),
        ("no-such-program-anywhere", "not in the PATH"),
        ("./scripts", "is a folder"),
    ] {
        let outcome = Program::ice_launch(["--devices", "cpu", program]).run(SOON);
        outcome.expect_code(ExitCode::Usage.code().into()).expect_in_stderr(&[program, why]);
    }
}

/// Runs the example with its data in this folder, as the launcher of two ranks.
fn mnist_from(folder: &Path) -> Finished {
    Program::new(built("mnist"))
        .args(["--devices", "cpu:0-1", "--data"])
        .arg(folder)
        .arg("--out-dir")
        .arg(folder.join("out"))
        .run(SOON)
}

#[test]
fn missing_data() {
    let folder = tempdir().unwrap();
    let outcome = mnist_from(folder.path());
    let looked_for = folder.path().join("train-images-idx3-ubyte");
    outcome
        .expect_code(ExitCode::Usage.code().into())
        .expect_in_stderr(&[looked_for.to_str().unwrap(), "scripts/fetch-mnist"]);
    assert!(!outcome.stderr.contains("rank"), "known before anything is spawned: {}", outcome.transcript());
}

#[test]
fn damaged_data() {
    let folder = tempdir().unwrap();
    for file in fs::read_dir(mnist_data()).unwrap() {
        let file = file.unwrap();
        let bytes = fs::read(file.path()).unwrap();
        fs::write(folder.path().join(file.file_name()), &bytes[..bytes.len() / 2]).unwrap();
    }
    let outcome = mnist_from(folder.path());
    outcome.expect_code(ExitCode::Usage.code().into()).expect_in_stderr(&[folder
        .path()
        .join("train-images-idx3-ubyte")
        .to_str()
        .unwrap()]);
}

#[test]
fn empty_variables_of_self_launching_program_count_as_unset() {
    let empty = ["NNODES", "NODE_RANK", "MASTER_PORT", "MAX_RESTARTS", "RDZV_CONF"];
    let program = empty
        .iter()
        .fold(Program::new(built("mnist")), |program, name| program.env(&format!("PET_{name}"), ""));
    let outcome = program.args(["--devices", "tpu:0"]).run(SOON);
    outcome.expect_code(ExitCode::Usage.code().into()).expect_in_stderr(&["--devices", "tpu:0"]);
}

#[test]
fn the_help_explains_the_options() {
    let launcher = Program::ice_launch(["--help"]).run(SOON);
    launcher.expect_code(0);
    for option in ["--devices", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--dist-backend"]
    {
        assert!(launcher.stdout.contains(option), "{option} is missing in {}", launcher.transcript());
    }
    for option in ["--run-id", "--max-restarts", "--monitor-interval", "--redirects", "--tee", "--log-dir"] {
        assert!(launcher.stdout.contains(option), "{option} is missing in {}", launcher.transcript());
    }
    let example = Program::new(built("mnist")).arg("--help").run(SOON);
    example.expect_code(0);
    for option in ["--data", "--epochs", "--batch-size", "--lr", "--dropout", "--seed", "--out-dir"] {
        assert!(example.stdout.contains(option), "{option} is missing in {}", example.transcript());
    }
    for option in ["--save-every-steps", "--resume-from", "--devices"] {
        assert!(example.stdout.contains(option), "{option} is missing in {}", example.transcript());
    }
}
