//! The programs under test, built once per test process by the cargo that runs the tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::root;

/// The program of this name: a binary or an example of the workspace, in the profile of the tests.
pub(crate) fn built(name: &str) -> &'static Path {
    static PROGRAMS: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    let profile: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
    let arguments = ["build", "--workspace", "--bins", "--examples"];
    let programs = PROGRAMS.get_or_init(|| executables(&[&arguments, profile].concat()));
    programs.get(name).unwrap_or_else(|| panic!("no program `{name}` among {:?}", programs.keys()))
}

/// Cargo, on this checkout, in the environment that a shell would give it.
///
/// A variable that cargo itself has set from `.cargo/config.toml` is taken out again: as a real variable it could count as
/// a change of configuration, and everything above torch-sys would be built anew.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root());
    if std::env::var_os("LIBTORCH").is_some_and(|value| Path::new(&value) == root().join(".deps/libtorch")) {
        cargo.env_remove("LIBTORCH");
    }
    cargo
}

/// Runs a `cargo build` and returns the executables that it made or found made, by name.
pub(crate) fn executables(arguments: &[&str]) -> BTreeMap<String, PathBuf> {
    let mut build = cargo();
    build
        .args(arguments)
        .args(["--locked", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit());
    let output = build.output().unwrap();
    assert!(output.status.success(), "{build:?} failed: {}", output.status);
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter_map(|message| {
            let executable = message["executable"].as_str()?;
            Some((message["target"]["name"].as_str()?.to_owned(), PathBuf::from(executable)))
        })
        .collect()
}
