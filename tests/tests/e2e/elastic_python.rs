//! PyTorch scripts that use the package `ice_launch` recover in place.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ice_proto::exit::ExitCode;
use serde_json::Value;
use tempfile::tempdir;

use crate::support::{
    Finished, Job, Program, TRAINING, free_port, newest_peer, peer, python_package, python_script,
};

/// Returns a launcher's program that runs the script of this name.
pub(crate) fn script(launcher: Program, python: &Path, name: &str) -> Program {
    let launcher = launcher.env("PYTHONPATH", python_package()).env("OMP_NUM_THREADS", "1");
    launcher.arg(python).arg(python_script(name))
}

/// Returns the rest of each line that begins with this word.
pub(crate) fn said<'a>(output: &'a str, word: &str) -> Vec<&'a str> {
    output.lines().filter_map(|line| line.strip_prefix(word)).collect()
}

/// Returns the process ids of each rank, in the order of its rounds.
fn processes(output: &str) -> BTreeMap<u32, Vec<u32>> {
    let mut all: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for line in said(output, "rank ") {
        let words: Vec<_> = line.split(' ').collect();
        all.entry(words[0].parse().unwrap()).or_default().push(words[4].parse().unwrap());
    }
    all
}

pub(crate) fn result(finished: &Finished) -> [Vec<&str>; 2] {
    finished.expect_code(0);
    [said(&finished.stdout, "seen "), said(&finished.stdout, "bits ")]
}

#[test]
fn survivors_keep_their_processes_and_the_result_has_the_bits_of_an_undisturbed_run() {
    let Some(python) = peer("elastic_python::survivors") else { return };
    // Three ranks: the sum of two numbers does not depend on their order, that of three does.
    let launcher = || {
        let launcher = Program::ice_launch(["--devices", "cpu:0-2", "--preload", "torch"]);
        script(launcher.args(["--max-restarts", "4"]), &python, "elastic.py")
    };
    let undisturbed = launcher().run(TRAINING);
    let undisturbed = result(&undisturbed);
    assert_eq!(undisturbed[0], ["[2.0] forwards 20 commits 20"]);
    // Rank 1 in the middle of a step, rank 0 once its gradients have been averaged, and rank 1
    // before it has them, in the first step of the second epoch.
    let kills = ["4:1:forward", "7:0:step", "11:1:backward"];
    let disturbed = launcher().args(kills).run(TRAINING);
    assert_eq!(result(&disturbed), undisturbed);
    let processes = processes(&disturbed.stdout);
    let changes = |rank: u32| processes[&rank].windows(2).map(|two| two[0] != two[1]).collect::<Vec<_>>();
    assert_eq!(changes(0), [false, true, false], "{}", disturbed.transcript());
    assert_eq!(changes(1), [true, false, true], "{}", disturbed.transcript());
    assert_eq!(changes(2), [false; 3], "{}", disturbed.transcript());
    // The job is stopped in the middle of a step, and begun again.
    let folder = tempdir().unwrap();
    let saving = || launcher().arg("--checkpoints").arg(folder.path());
    let stopped = saving().arg("5:1:forward:stop").run(TRAINING);
    stopped.expect_code(ExitCode::Signal(2).code().into());
    let resumed = saving().run(TRAINING);
    assert_eq!(result(&resumed), undisturbed);
    let commits = said(&resumed.stdout, "rank 0 of 3 pid ")[0];
    assert!(commits.ends_with("commits 5") || commits.ends_with("commits 6"), "{}", resumed.transcript());
}

#[test]
fn hang_and_wrong_gradients_of_an_elastic_script_name_step_and_rank() {
    let Some(python) = peer("elastic_python::hang_and_wrong_gradients") else { return };
    let folder = tempdir().unwrap();
    let launcher = Program::ice_launch(["--devices", "cpu:0-1", "--preload", "torch", "--max-restarts", "2"])
        .args(["--hang-timeout", "3", "--progress-interval", "0.001", "--run-id", "job", "--log-dir"])
        .arg(folder.path());
    let job = script(launcher, &python, "elastic.py").arg("--check-finite");
    let finished = job.args(["5:1:forward:hang", "0:1:start", "9:1:backward:nan"]).run(TRAINING);
    finished.expect_code(1);
    finished.expect_in_stderr(&[
        "rank 1: no rank got anything done for 3 s; it is at step 4 of 4: writing the stacks",
        // A timeout that is given makes CPU time count until the rank opens its link.
        "rank 1: no rank used the CPU for 3 s: writing the stacks",
        "the gradients of rank 1 in step 9 are not finite, and were not applied",
    ]);
    let progress = said(&finished.stderr, "train  epoch 1  step ");
    assert!(
        progress.iter().any(|line| line.starts_with("1/15  loss ") && line.contains(" samples/s")),
        "{}",
        finished.transcript()
    );
    let report = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path().join("report.json");
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert!(report["goodput"].as_f64().is_some_and(|share| share > 0.0), "{report}");
}

#[test]
fn three_nodes_shrink_to_two_and_each_sample_counts_once() {
    let Some(python) = peer("elastic_python::three_nodes_shrink") else { return };
    let port = free_port().to_string();
    let agent = |node: &str| -> Job {
        let launcher = Program::ice_launch(["--nnodes", "2:3", "--devices", "cpu:0", "--max-restarts", "4"])
            .args(["--master-addr", "127.0.0.1", "--master-port", &port, "--node-rank", node])
            .args(["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=1", "--preload", "torch"]);
        script(launcher, &python, "elastic.py").arg("4:2:backward:agent").start()
    };
    let [first, second, killed] = ["0", "1", "2"].map(agent);
    let (first, second) = (first.finish(TRAINING), second.finish(TRAINING));
    drop(killed);
    second.expect_code(0);
    // 3 steps of 6 samples, 11 of 4 with the last one of 2, and an epoch of 15 steps.
    assert_eq!(result(&first)[0], ["[2.0] forwards 29 commits 29"], "{}", first.transcript());
    let of_first = &processes(&first.stdout)[&0];
    assert!(of_first.len() == 2 && of_first[0] == of_first[1], "{}", first.transcript());
}

#[test]
fn elastic_script_without_a_launcher_runs_alone() {
    let Some(python) = peer("elastic_python::elastic_script_without_a_launcher") else { return };
    let alone = script(Program::new("env"), &python, "elastic.py").run(TRAINING);
    assert_eq!(result(&alone)[0], ["[2.0] forwards 60 commits 60"]);
}

#[test]
fn package_keeps_its_promises_within_one_process() {
    let Some(python) = peer("elastic_python::package_keeps_its_promises") else { return };
    for python in [Some(python), newest_peer("elastic_python::package_keeps_its_promises")].iter().flatten() {
        let checked = script(Program::new("env"), python, "elastic_package.py").run(TRAINING);
        assert_eq!(checked.expect_code(0).last_line(), "checked");
    }
}
