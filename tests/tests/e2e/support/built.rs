//! The programs under test, built once per test process by the cargo that runs the tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::root;

/// Returns the program of this name: a binary or an example of the workspace, in the profile of the
/// tests.
pub(crate) fn built(name: &str) -> &'static Path {
    static PROGRAMS: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    let executable = |message: &Value| {
        let executable = message["executable"].as_str()?;
        Some((message["target"]["name"].as_str()?.to_owned(), PathBuf::from(executable)))
    };
    let programs = PROGRAMS.get_or_init(|| workspace().iter().filter_map(executable).collect());
    programs.get(name).unwrap_or_else(|| panic!("no program `{name}` among {:?}", programs.keys()))
}

/// Returns a folder that holds the Python package `ice_launch`, for `PYTHONPATH`.
pub(crate) fn python_package() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let files = workspace().iter().filter_map(|message| message["filenames"].as_array()).flatten();
        let mut libraries = files.filter_map(Value::as_str).filter(|file| file.ends_with("ice_python.so"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
        let package = folder.join("ice_launch");
        let _ = fs::remove_dir_all(&package);
        fs::create_dir_all(&package).unwrap();
        symlink(libraries.next().unwrap(), package.join("_link.abi3.so")).unwrap();
        for source in fs::read_dir(root().join("launcher/python/ice_launch")).unwrap() {
            let source = source.unwrap();
            if source.path().is_file() {
                symlink(source.path(), package.join(source.file_name())).unwrap();
            }
        }
        folder
    })
}

/// Builds the workspace, and returns the messages of cargo. One command for everything, so that
/// nothing is compiled a second time with other features.
fn workspace() -> &'static [Value] {
    static MESSAGES: OnceLock<Vec<Value>> = OnceLock::new();
    MESSAGES.get_or_init(|| {
        let profile: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        let mut build = cargo();
        build
            .args(["build", "--workspace", "--lib", "--bins", "--examples"])
            .args(profile)
            .args(["--locked", "--message-format=json-render-diagnostics"])
            .stderr(Stdio::inherit());
        let output = build.output().unwrap();
        assert!(output.status.success(), "{build:?} failed: {}", output.status);
        let output = String::from_utf8(output.stdout).unwrap();
        output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    })
}

/// Returns cargo for this checkout, in the environment of a shell.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).env_remove("LD_LIBRARY_PATH");
    forget_package(&mut cargo);
    // This value is from `.cargo/config.toml`. As a variable of the environment, it would make
    // cargo compile torch-sys again.
    if std::env::var_os("LIBTORCH").is_some_and(|value| Path::new(&value) == root().join(".deps/libtorch")) {
        cargo.env_remove("LIBTORCH");
    }
    cargo
}

/// Removes the variables of the package that cargo sets for its tests: OUT_DIR, CARGO_MANIFEST_DIR
/// and others.
///
/// The build script of ring asks to run again when these variables change. With them, a cargo that
/// the command runs would compile ring and the crates that use it, and so would the next cargo in a
/// shell.
pub(crate) fn forget_package(command: &mut Command) {
    let starts = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
    command.env_remove("OUT_DIR");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| starts.iter().any(|start| name.starts_with(start))) {
            command.env_remove(name);
        }
    }
}
