//! The launcher's own error file, which a platform reads.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::tempdir;

use crate::support::{Finished, Job, free_port, launch, run};
use crate::{STAY, TWO};

const NAME: &str = "TORCHELASTIC_ERROR_FILE";

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Runs a command and returns the content of the launcher's error file.
fn written(mut command: Command, finish: impl FnOnce(Job) -> Finished) -> (Finished, Value) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("reply.json");
    command.env(NAME, &path);
    let finished = finish(Job::start(command));
    (finished, read(&path))
}

#[test]
fn error_file_of_the_failed_rank_is_the_launchers() {
    let script = format!(
        r#"[ $RANK = 1 ] || {STAY}
        echo '{{"message": {{"message": "ValueError: no such shard", "extraInfo": {{"py_callstack": "T", "timestamp": "17"}}}}}}' > ${NAME}
        exit 3"#
    );
    let (finished, document) = written(launch(&TWO, &script), Job::finish);
    finished.expect(3, &[]);
    let message = &document["message"];
    assert_eq!(
        (message["message"].as_str(), message["errorCode"].as_i64()),
        (Some("ValueError: no such shard"), Some(3))
    );
    assert_eq!(message["extraInfo"]["timestamp"], "17");
}

#[test]
fn rank_that_leaves_no_error_file_is_described() {
    let script = "echo first >&2; echo last >&2; kill -9 $$";
    let (finished, document) = written(launch(&["--devices", "cpu"], script), Job::finish);
    finished.expect(137, &[]);
    let message = &document["message"];
    let text = message["message"].as_str().unwrap();
    assert!(text.starts_with("rank 0 on ") && text.contains("SIGKILL"), "{document}");
    assert_eq!(message["errorCode"], -9);
    assert_eq!(message["extraInfo"]["py_callstack"], "first\nlast");
}

#[test]
fn restart_that_succeeds_leaves_no_error_file() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("reply.json");
    let mut command =
        launch(&["--devices", "cpu", "--max-restarts", "1"], "exit $((1 - TORCHELASTIC_RESTART_COUNT))");
    command.env(NAME, &path);
    run(command).expect(0, &["restart 1 of 1"]);
    assert!(!path.exists());
}

#[test]
fn usage_error_stop_and_failure_elsewhere_are_written_too() {
    let (finished, document) = written(launch(&["--devices", "tpu"], "exit 0"), Job::finish);
    finished.expect(2, &[]);
    assert!(document["message"]["message"].as_str().unwrap().contains("--devices"), "{document}");

    let script = format!("echo ready; {STAY}");
    let (finished, document) = written(launch(&["--devices", "cpu"], &script), |mut job| {
        job.expect_line("ready");
        job.signal(Signal::TERM);
        job.finish()
    });
    finished.expect(143, &[]);
    assert_eq!(document["message"]["message"], "told to stop by SIGTERM");

    let port = free_port();
    let node =
        |rank| ["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", &port].to_vec();
    let script = format!("[ $RANK = 1 ] || {STAY}; exit 9");
    let other = Job::start(launch(&node("1"), &script));
    let (finished, document) = written(launch(&node("0"), &script), Job::finish);
    finished.expect(1, &[]);
    other.finish().expect(9, &[]);
    let text = document["message"]["message"].as_str().unwrap();
    assert!(text.contains("node 1") && text.contains("exit code 9"), "{document}");
}

#[test]
fn ranks_never_write_to_the_launchers_file() {
    let script = format!("echo ${NAME}");
    let mut command = launch(&TWO, &script);
    command.env(NAME, "/of/the/platform");
    let finished = run(command);
    assert!(finished.expect(0, &[]).stdout.iter().all(|path| path.ends_with("/error.json")), "{finished:?}");
}
