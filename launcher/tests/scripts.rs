//! The scripts install missing tools, or name them in one line.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Tools that the scripts use on any machine.
const BASIC: [&str; 14] = [
    "bash", "sed", "cut", "sort", "id", "date", "dirname", "mkdir", "flock", "cat", "chmod", "env", "true",
    "readlink",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// A machine with few tools: a folder that is its whole PATH.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for tool in BASIC {
            let found = std::env::split_paths(&std::env::var_os("PATH").unwrap())
                .map(|folder| folder.join(tool))
                .find(|path| path.exists());
            symlink(found.unwrap_or_else(|| panic!("{tool}")), machine.0.path().join(tool)).unwrap();
        }
        machine
    }

    fn add(&self, tool: &str, script: &str) {
        let path = self.0.path().join(tool);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Adds an apt-get that logs its arguments, and makes a program for each package.
    fn add_apt(&self) {
        let script = "echo \"apt-get $*\" >> \"$BIN/apt.log\"
            [ \"$1\" = install ] || exit 0
            for package; do
                printf '#!/bin/sh\\n' > \"$BIN/$package\" && chmod +x \"$BIN/$package\"
            done";
        self.add("apt-get", script);
    }

    /// Returns the arguments that apt-get received.
    fn asked(&self) -> String {
        fs::read_to_string(self.0.path().join("apt.log")).unwrap_or_default()
    }

    /// Runs lines of a script that has sourced `scripts/lib.sh`.
    fn run(&self, lines: &str) -> Output {
        let lib = root().join("scripts/lib.sh");
        let script = format!("set -euo pipefail; . '{}'; {lines}", lib.display());
        let bin = self.0.path();
        let mut command = Command::new("bash");
        command.args(["-c", &script]).env_clear().env("PATH", bin).env("BIN", bin).env("HOME", bin);
        command.output().unwrap()
    }

    /// Runs lines as an ordinary user: `id` prints another user than root.
    fn run_as_user(&self, lines: &str) -> Output {
        fs::remove_file(self.0.path().join("id")).unwrap();
        self.add("id", "echo 1000");
        self.run(lines)
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const RUST: &str = "echo cargo 9.0.0";

#[test]
fn missing_tools_are_named_in_one_line() {
    let machine = Machine::new();
    machine.add("cargo", RUST);
    let output = machine.run_as_user("need cargo g++ python3 pip npm certificates etcd ip");
    let (names, packages) = (
        "g++, python3, pip, npm, certificates, etcd, ip",
        "g++ python3 python3-pip npm ca-certificates etcd-server iproute2",
    );
    // The machine of the test may have certificates, so they may be missing from the list.
    let all = format!("error: not installed: {names}; as root: apt-get install {packages}\n");
    let others = all.replace(", certificates", "").replace(" ca-certificates", "");
    assert!([all, others].contains(&stderr(&output)), "{output:?}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn missing_tools_are_installed_together() {
    for user in [false, true] {
        let machine = Machine::new();
        machine.add("cargo", RUST);
        machine.add("curl", "");
        machine.add_apt();
        machine.add("sudo", "[ \"$1\" = -n ] || exit 1; shift; exec \"$@\"");
        let script = "need cargo curl g++ npm; command -v g++ npm";
        let output = if user { machine.run_as_user(script) } else { machine.run(script) };
        assert!(output.status.success(), "{output:?}");
        let asked = "apt-get update -qq\napt-get install -y -qq --no-install-recommends g++ npm\n";
        assert_eq!(machine.asked(), asked);
        assert_eq!(stderr(&output), "    installing g++ npm\n");
    }
}

#[test]
fn sudo_that_asks_for_a_password_is_not_used() {
    let machine = Machine::new();
    machine.add("cargo", RUST);
    machine.add_apt();
    machine.add("sudo", "echo 'sudo: a password is required' >&2; exit 1");
    let output = machine.run_as_user("need cargo g++");
    assert_eq!(stderr(&output), "error: not installed: g++; as root: apt-get install g++\n");
    assert_eq!((output.status.code(), machine.asked()), (Some(1), String::new()));
}

#[test]
fn an_installation_that_fails_is_shown_and_the_command_named() {
    let machine = Machine::new();
    machine.add("apt-get", "echo 'E: no network' >&2; exit 100");
    machine.add("sudo", "shift; exec \"$@\"");
    let output = machine.run_as_user("need g++");
    let expected =
        "    installing g++\nE: no network\nerror: not installed: g++; as root: apt-get install g++\n";
    assert_eq!(stderr(&output), expected);
    // A tool that is only offered is not an error.
    assert!(machine.run("if offer g++; then exit 1; fi").status.success());
}

#[test]
fn rust_is_not_taken_from_the_distribution() {
    for cargo in [None, Some("echo cargo 1.63.0")] {
        let machine = Machine::new();
        cargo.into_iter().for_each(|script| machine.add("cargo", script));
        machine.add_apt();
        let output = machine.run("need cargo g++");
        let line = stderr(&output);
        assert!(line.starts_with("error: not installed: cargo, g++; Rust 1."), "{line}");
        assert!(line.ends_with(" or later: see https://rustup.rs; as root: apt-get install g++\n"), "{line}");
        assert_eq!(machine.asked(), "");
    }
}
