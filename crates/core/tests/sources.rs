//! The sources that a run copies.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs;
use std::path::Path;
use std::rc::Rc;

use common::turn;
use ice_core::{HyperGraph, Repeat, Run, RunConfig};
use ice_worker::Worker;
use tch::Device;

fn write(folder: &Path, file: &str, content: &[u8]) {
    let path = folder.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

#[test]
fn what_git_ignores_and_what_the_run_makes_is_not_among_the_sources() {
    let _turn = turn();
    let work = tempfile::tempdir().unwrap();
    let project = work.path().join("project");
    for file in
        ["Cargo.toml", "src/main.rs", ".cargo/config.toml", "target/debug/program", ".git/HEAD", "notes.tmp"]
    {
        write(&project, file, file.as_bytes());
    }
    write(&project, ".gitignore", b"/target/\n*.tmp\n");
    write(&project, "src/weights.bin", &vec![0; 9 << 20]);
    write(work.path(), "extra/project/README.md", b"extra");
    write(work.path(), "run.sh", b"run");
    let out_dir = project.join("out");
    let run = || {
        let mut graph = HyperGraph::new();
        graph.backup_source_files(&project).backup_source_files(work.path().join("extra/project"));
        graph.backup_source_files(work.path().join("run.sh"));
        let config = RunConfig { out_dir: out_dir.clone(), ..RunConfig::default() };
        Run::execute(&graph, &Repeat::once(), Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
    };
    run();
    let kept = out_dir.join("none_local/src");
    let mut files = Vec::new();
    let mut folders = vec![kept.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => folders.push(entry),
                false => files.push(entry.strip_prefix(&kept).unwrap().display().to_string()),
            }
        }
    }
    files.sort();
    let expected = [
        "project-2/README.md",
        "project/.cargo/config.toml",
        "project/.gitignore",
        "project/Cargo.toml",
        "project/src/main.rs",
        "run.sh",
    ];
    assert_eq!(files, expected);

    // A restart keeps the sources from the start of the run.
    write(&project, "src/main.rs", b"changed");
    run();
    assert_eq!(fs::read(kept.join("project/src/main.rs")).unwrap(), b"src/main.rs");

    // If a source is missing, as on a machine other than the build machine, the run continues
    // without it.
    let mut graph = HyperGraph::new();
    graph.backup_source_files(work.path().join("nowhere")).backup_source_files(work.path().join("run.sh"));
    let config = RunConfig { out_dir: work.path().join("other"), ..RunConfig::default() };
    Run::execute(&graph, &Repeat::once(), Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
    assert!(work.path().join("other/none_local/src/run.sh").is_file());
}
