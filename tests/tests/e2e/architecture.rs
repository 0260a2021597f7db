//! Dependencies between crates and modules, and names that are confined to some of them
//! (ARCHITECTURE.md).

mod modules;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{built, cargo, root};

struct Packages {
    names: BTreeMap<String, String>,
    /// Ids of the packages that are compiled into a package or run to build it, by its id.
    dependencies: BTreeMap<String, Vec<String>>,
    members: BTreeSet<String>,
}

impl Packages {
    fn read() -> Self {
        let output = cargo().args(["metadata", "--locked", "--format-version", "1"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let list = |value: &Value| value.as_array().unwrap().clone();
        let used =
            |dependency: &Value| list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev");
        Self {
            names: list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect(),
            dependencies: list(&metadata["resolve"]["nodes"])
                .iter()
                .map(|node| {
                    let uses = list(&node["deps"]);
                    (text(&node["id"]), uses.iter().filter(|d| used(d)).map(|d| text(&d["pkg"])).collect())
                })
                .collect(),
            members: list(&metadata["workspace_members"]).iter().map(text).collect(),
        }
    }

    fn member(&self, name: &str) -> &str {
        self.members.iter().find(|id| self.names[*id] == name).unwrap_or_else(|| panic!("no member `{name}`"))
    }

    /// Returns the names of all packages that the member reaches.
    fn reach(&self, name: &str) -> BTreeSet<&str> {
        let (mut seen, mut open) = (BTreeSet::new(), vec![self.member(name)]);
        while let Some(id) = open.pop() {
            for next in &self.dependencies[id] {
                if seen.insert(next.as_str()) {
                    open.push(next);
                }
            }
        }
        seen.into_iter().map(|id| self.names[id].as_str()).collect()
    }
}

#[test]
fn crates_without_libtorch_never_reach_it() {
    let packages = Packages::read();
    let torch = BTreeSet::from(["tch", "torch-sys", "ice-c10d"]);
    let without = [
        "ice-proto",
        "ice-agent",
        "ice-coordinator",
        "ice-store",
        "ice-link",
        "ice-python",
        "ice-rendezvous",
        "ice-launch",
        "ice-checkpoint",
        "ice-ckpt",
    ];
    for name in without {
        let reached = packages.reach(name);
        let wrong: Vec<_> = torch.intersection(&reached).collect();
        assert!(wrong.is_empty(), "{name} reaches {wrong:?}");
    }
    assert!(torch.is_subset(&packages.reach("ice-worker")), "the check sees libtorch where it is used");
}

#[test]
fn crates_depend_in_one_direction() {
    let packages = Packages::read();
    let forbidden = [
        ("ice-agent", &["ice-rendezvous", "ice-link", "ice-launch", "tokio", "nix", "rustix", "libc"][..]),
        ("ice-coordinator", &["ice-rendezvous", "ice-link", "ice-launch", "tokio", "nix", "rustix", "libc"]),
        ("ice-store", &["ice-proto", "ice-rendezvous", "ice-link", "tokio", "nix", "rustix", "libc"]),
        (
            "ice-proto",
            &[
                "ice-agent",
                "ice-coordinator",
                "ice-link",
                "ice-rendezvous",
                "ice-launch",
                "ice-worker",
                "ice-core",
                "ice",
            ],
        ),
        ("ice-link", &["ice-rendezvous", "ice-launch", "ice-worker", "ice-core", "ice"]),
        ("ice-python", &["ice-launch", "ice-worker", "ice-core", "ice"]),
        ("ice-rendezvous", &["ice-link", "ice-launch", "ice-worker", "ice-core", "ice"]),
        ("ice-launch", &["ice-link", "ice-worker", "ice-core", "ice"]),
        ("ice-checkpoint", &["ice-proto", "ice-rendezvous", "ice-launch", "ice-worker", "ice-core", "ice"]),
        ("ice-ckpt", &["ice-proto", "ice-rendezvous", "ice-launch", "ice-worker", "ice-core", "ice"]),
        (
            "ice-c10d",
            &["ice-proto", "ice-link", "ice-rendezvous", "ice-launch", "ice-worker", "ice-core", "ice"],
        ),
        ("ice-nn", &["ice-proto", "ice-rendezvous", "ice-launch", "ice-worker", "ice-core", "ice"]),
        ("ice-worker", &["ice-rendezvous", "ice-launch", "ice-core", "ice"]),
        ("ice-core", &["ice-rendezvous", "ice-launch", "ice-ckpt", "ice"]),
    ];
    for (from, to) in forbidden {
        let reached = packages.reach(from);
        for name in to {
            assert!(!reached.contains(name), "{from} reaches {name}");
        }
    }
}

#[test]
fn bincode_is_named_by_proto_only() {
    let packages = Packages::read();
    let users: Vec<_> = packages
        .members
        .iter()
        .filter(|id| packages.dependencies[*id].iter().any(|d| packages.names[d].starts_with("bincode")))
        .map(|id| packages.names[id].as_str())
        .collect();
    assert_eq!(users, ["ice-proto"]);
}

fn needed(program: &Path) -> Vec<String> {
    let output = Command::new("readelf").arg("-d").arg(program).env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "readelf -d {program:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| line.contains("(NEEDED)"));
    lines.map(|line| line.split(['[', ']']).nth(1).unwrap().to_owned()).collect()
}

#[test]
fn launcher_is_linked_to_neither_libtorch_nor_python() {
    let parts = ["torch", "c10", "stdc++", "cuda", "python"];
    let torch = |name: &String| parts.iter().any(|part| name.contains(part));
    let launcher = needed(built("ice-launch"));
    assert!(!launcher.iter().any(torch), "ice-launch needs {launcher:?}");
    assert!(needed(built("rank")).iter().any(torch), "the check sees libtorch where it is linked");
}

/// Returns the Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}")) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Returns the lines of a file whose code, without comments, contains one of the words.
fn lines_with(file: &Path, words: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    let holds = |line: &str, word: &str| {
        line.match_indices(word)
            .any(|(at, _)| !line[..at].ends_with(inside) && !line[at + word.len()..].starts_with(inside))
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| {
            let code = line.split("//").next().unwrap_or_default();
            words.iter().any(|word| holds(code, word))
        })
        .map(|(number, line)| format!("{}:{}: {}", file.display(), number + 1, line.trim()))
        .collect()
}

#[test]
fn state_machines_are_pure() {
    let impure = [
        "tokio",
        "nix",
        "rustix",
        "libc",
        "Instant::now",
        "SystemTime",
        "HashMap",
        "HashSet",
        "rand",
        "std::fs",
        "std::net",
    ];
    for folder in ["crates/agent/src", "crates/coordinator/src"] {
        let files = sources(&root().join(folder));
        assert!(!files.is_empty(), "{folder} holds no code");
        let found: Vec<_> = files.iter().flat_map(|file| lines_with(file, &impure)).collect();
        assert!(found.is_empty(), "a pure machine names what it must not:\n{}", found.join("\n"));
    }
    let dispatcher = root().join("launcher/src/dispatcher");
    let found: Vec<_> = sources(&dispatcher).iter().flat_map(|file| lines_with(file, &impure)).collect();
    assert!(!found.is_empty(), "the check sees tokio where it is used");
}

#[test]
fn unsafe_code_is_confined() {
    let allowed = ["crates/c10d", "crates/link/src/process", "crates/link/tests", "launcher/src/supervise"]
        .map(|folder| root().join(folder));
    let folders = ["launcher/src", "rendezvous/src", "worker/src", "crates", "tests/src"];
    let files: Vec<_> = folders.iter().flat_map(|folder| sources(&root().join(folder))).collect();
    let (inside, outside): (Vec<_>, Vec<_>) =
        files.iter().partition(|file| allowed.iter().any(|folder| file.starts_with(folder)));
    let found: Vec<_> = outside.iter().flat_map(|file| lines_with(file, &["unsafe"])).collect();
    assert!(found.is_empty(), "unsafe code outside {allowed:?}:\n{}", found.join("\n"));
    assert!(
        inside.iter().any(|file| !lines_with(file, &["unsafe"]).is_empty()),
        "the check sees unsafe code"
    );
}
