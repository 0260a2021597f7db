//! A project outside the checkout: made by scripts/new-project, built by cargo alone, trained from
//! its own folder.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::tempdir;

use crate::support::{Program, TRAINING, cargo, root};

/// Runs a command and returns its output. Fails if the exit code is not `expected`.
fn run(command: &mut Command, expected: i32) -> Output {
    let output = command.output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(expected),
        "{command:?}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn script(name: &str) -> Command {
    let mut script = Command::new(root().join("scripts").join(name));
    script.env_remove("LIBTORCH");
    script
}

/// Expects that a script refuses its arguments with this message.
fn refused(command: &mut Command, words: &str) {
    let output = run(command, 1);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(words), "{command:?}: {stderr}");
}

#[test]
fn projects_that_cannot_be_are_refused() {
    let folder = tempdir().unwrap();
    let there = folder.path().join("there");
    fs::create_dir(&there).unwrap();
    refused(script("new-project").arg(&there), "is there already");
    refused(script("new-project").arg(folder.path().join("1st")), "cannot be the name of a package");
    refused(script("new-project").arg(root().join("target/inside")), "lies inside the checkout");
    refused(&mut script("new-project"), "no folder for the project");
    refused(script("ice-setup").arg(&there), "has no Cargo.toml");
    refused(script("ice-setup").arg(root()), "is the checkout of ice-launch itself");
}

#[test]
fn set_up_leaves_files_of_a_project_alone_and_shows_the_lines_that_they_lack() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("Cargo.toml"), "[package]\nname = \"mine\"\n").unwrap();
    fs::write(folder.path().join("build.rs"), "fn main() {}\n").unwrap();
    let output = run(script("ice-setup").arg(folder.path()), 0);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("build.rs is there and lacks these lines") && stderr.contains("DEP_ICE_LIBTORCH_LIB"),
        "{stderr}"
    );
    assert_eq!(fs::read_to_string(folder.path().join("build.rs")).unwrap(), "fn main() {}\n");
    let config = fs::read_to_string(folder.path().join(".cargo/config.toml")).unwrap();
    assert!(config.contains("LIBTORCH"), "{config}");
    assert!(folder.path().join(".deps/libtorch/lib/libtorch_cpu.so").is_file());
    assert_eq!(fs::read_to_string(folder.path().join(".deps/.gitignore")).unwrap(), "*\n");
    let versions = folder.path().join("Cargo.lock");
    assert_eq!(fs::read(&versions).unwrap(), fs::read(root().join("Cargo.lock")).unwrap());
    fs::write(&versions, "version = 4\n").unwrap();
    let next = format!("next: cd {} && cargo run", folder.path().display());
    assert!(stderr.contains(&next), "{stderr}");
    // A second run changes nothing.
    let again = String::from_utf8(run(script("ice-setup").arg(folder.path()), 0).stderr).unwrap();
    assert!(again.contains("already there") && !again.contains("wrote"), "{again}");
    assert_eq!(fs::read_to_string(&versions).unwrap(), "version = 4\n");
}

/// Without readers, TLS and etcd: the other tests build all of them.
#[test]
fn a_project_outside_the_checkout_builds_trains_and_resumes() {
    let folder = tempdir().unwrap();
    let project = folder.path().join("spirals");
    run(script("new-project").arg(&project), 0);
    let manifest = project.join("Cargo.toml");
    let lean = fs::read_to_string(&manifest)
        .unwrap()
        .replace("/crates/ice\" }", "/crates/ice\", default-features = false }");
    assert!(lean.contains("default-features"), "{lean}");
    fs::write(&manifest, lean).unwrap();

    // Users have neither the configuration nor the libtorch of the checkout. The target folder is
    // kept, so that the next run builds less.
    let mut cargo = cargo();
    cargo.env_remove("LIBTORCH");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("outside");
    cargo.current_dir(&project).env("CARGO_TARGET_DIR", &target).args(["build", "--offline"]);
    run(&mut cargo, 0);

    let elsewhere = tempdir().unwrap();
    let train = |arguments: &[&str]| {
        Program::new(target.join("debug/spirals"))
            .env("LD_LIBRARY_PATH", "")
            .args(["--devices", "cpu:0-1", "--out-dir"])
            .arg(elsewhere.path())
            .args(arguments)
            .run(TRAINING)
    };
    let first = train(&["--epochs", "1"]);
    first.expect_code(0);
    assert!(first.transcript().contains("accuracy"), "{}", first.transcript());
    let second = train(&["--epochs", "2", "--resume-from", "latest"]);
    second.expect_code(0);
    assert!(second.transcript().contains("resuming from"), "{}", second.transcript());
    train(&["--rdzv-tls"]).expect_code(2).expect_in_stderr(&["built without `tls`"]);
    train(&["--rdzv-backend", "etcd", "--rdzv-endpoint", "127.0.0.1:1"])
        .expect_code(2)
        .expect_in_stderr(&["built without `etcd`"]);
}
