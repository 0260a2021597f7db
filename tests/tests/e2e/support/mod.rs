//! Shared parts of the tests: built programs, started jobs, and paths.

mod built;
mod job;
mod leftovers;
mod saved;
mod traces;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use built::forget_package;
pub(crate) use built::{built, cargo, python_package};
pub(crate) use job::{Finished, Job, Program};
pub(crate) use saved::checkpoints;
pub(crate) use traces::{SAMPLES, Traces, assert_epochs, last_pass, random};

/// Limit for any operation except training. The limit bounds a failure; no test waits for it to
/// pass.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Limit for a training run of the tests.
pub(crate) const TRAINING: Duration = Duration::from_secs(600);

/// Returns the root of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Returns the folder of the real MNIST.
pub(crate) fn mnist_data() -> PathBuf {
    let folder = root().join(".deps/mnist");
    assert!(folder.join("train-images-idx3-ubyte").is_file(), "no MNIST in {folder:?}: run scripts/setup");
    folder
}

/// Returns the Python of the full torch, or `None` after printing why a test is skipped.
pub(crate) fn peer(test: &str) -> Option<PathBuf> {
    installed(test, "peer")
}

/// Returns the Python of the newest torch, or `None` after printing why a test runs without it.
pub(crate) fn newest_peer(test: &str) -> Option<PathBuf> {
    installed(test, "peer-newest")
}

/// Returns the Python that `scripts/setup` installs with an option.
fn installed(test: &str, option: &str) -> Option<PathBuf> {
    let folder = option.trim_start_matches("peer-");
    let python = root().join(format!(".deps/{folder}/bin/python"));
    if python.is_file() {
        return Some(python);
    }
    let wanted = std::env::var("ICE_TEST_PEER").is_ok_and(|value| value == "1");
    assert!(!wanted, "ICE_TEST_PEER=1, and {python:?} is missing: run scripts/setup --{option}");
    println!("{test} is skipped or goes without {python:?} (scripts/setup --{option} installs it)");
    None
}

/// Returns the path of a script of tests/python.
pub(crate) fn python_script(name: &str) -> PathBuf {
    root().join("tests/python").join(name)
}

/// Returns a port of the loopback interface that no process listens on now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Polls until a condition holds that has no event. Fails after the time limit, with the name of
/// the condition.
pub(crate) fn wait_until(limit: Duration, name: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {limit:?} for {name}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Writes an executable shell script to the folder.
pub(crate) fn shell_script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}
