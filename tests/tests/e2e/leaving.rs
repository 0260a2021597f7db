//! A node of several that receives a signal to stop: all ranks of the job save before this node
//! leaves.

use std::path::{Path, PathBuf};

use ice_proto::exit::ExitCode;
use rustix::process::Signal;
use tempfile::tempdir;

use crate::forms::Run;
use crate::stopping::events;
use crate::support::{Job, SOON, TRAINING, free_port, wait_until};

fn training(folder: &Path) -> Run {
    Run::new(&folder.join("out")).args(["--epochs", "1", "--steps", "100000", "--split-checkpoints"])
}

/// Starts two agents whose ranks all write a share of each checkpoint.
fn two_nodes(folder: &Path, nnodes: &str) -> [(Job, PathBuf); 2] {
    let run = training(folder);
    let endpoint = format!("127.0.0.1:{}", free_port());
    let nodes = ["0", "1"].map(|node| {
        let log = folder.join(node);
        let options = ["--nnodes", nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", &endpoint];
        let more = ["--node-rank", node, "--devices", "cpu:0", "--events", log.to_str().unwrap()];
        let more = [&more[..], &["--preempt-notice", "HUP"]].concat();
        (run.under_ice_launch(&[&options[..], &more[..]].concat()).start(), log)
    });
    nodes[0].0.wait_for_error_text(TRAINING, "step");
    nodes
}

/// Returns the only checkpoint that a node has reported, and checks that all ranks have written
/// their shares.
fn checkpoint(log: &Path) -> String {
    let saved = events(log, "checkpoint_saved");
    assert_eq!(saved.len(), 1, "{saved:?}");
    let path = saved[0]["path"].as_str().unwrap().to_owned();
    for shard in ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"] {
        assert!(Path::new(&path).join(shard).is_file(), "{path} has no {shard}");
    }
    path
}

#[test]
fn a_node_leaves_once_the_ranks_of_all_nodes_have_saved() {
    let folder = tempdir().unwrap();
    let [(first, log), (second, other)] = two_nodes(folder.path(), "2");
    second.signal(Signal::TERM);
    second.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
    let outcome = first.finish(TRAINING);
    outcome.expect_code(ExitCode::Failure.code().into()).expect_in_stderr(&["left: told to stop by SIGTERM"]);
    checkpoint(&log);
    for rank in events(&log, "rank_ended").iter().chain(&events(&other, "rank_ended")) {
        assert_eq!(rank["exit_code"], 0, "not ended by itself: {rank} {}", outcome.transcript());
    }
}

#[test]
fn what_was_saved_for_a_node_that_leaves_is_where_the_others_go_on() {
    let folder = tempdir().unwrap();
    let [(first, log), (second, _)] = two_nodes(folder.path(), "1:2");
    second.signal(Signal::TERM);
    second.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
    let line = first.wait_for_line(TRAINING, |line| line.contains("continuing after step"));
    let saved = checkpoint(&log);
    let (_, step) = saved.rsplit_once('S').unwrap();
    assert!(
        line.contains(&format!("after step {step} on 1 rank, from the memory of rank 0")),
        "{line} {saved}"
    );
    first.signal(Signal::TERM);
    first.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
}

#[test]
fn two_nodes_pause_together() {
    let folder = tempdir().unwrap();
    let [(first, log), (second, other)] = two_nodes(folder.path(), "2");
    let both =
        |name: &str| wait_until(SOON, name, || [&log, &other].map(|log| events(log, name).len()) == [1, 1]);
    second.signal(Signal::USR2);
    both("paused");
    // Either node may resume the job.
    first.signal(Signal::USR2);
    both("resumed");
    // Both nodes receive the signal at once, each from its scheduler.
    first.signal(Signal::TERM);
    second.signal(Signal::TERM);
    for job in [first, second] {
        job.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
    }
    checkpoint(&log);
}

#[test]
fn a_job_that_is_preempted_saves_says_so_and_goes_on_there_when_it_is_started_again() {
    let folder = tempdir().unwrap();
    let [(first, log), (second, _)] = two_nodes(folder.path(), "2");
    second.signal(Signal::HUP);
    second.finish(TRAINING).expect_code(75).expect_in_stderr(&["preempted: SIGHUP"]);
    let first = first.finish(TRAINING);
    let saved = checkpoint(&log);
    let (_, step) = saved.rsplit_once('S').unwrap();
    let again =
        format!("start the job again (exit code 75), and it can resume after step {step} from {saved}");
    first.expect_code(75).expect_in_stderr(&["left: preempted: SIGHUP", &again]);
    let again = training(folder.path()).args(["--resume-from", "latest"]);
    let again = again.under_ice_launch(&["--devices", "cpu:0-1"]).start();
    again.wait_for_line(TRAINING, |line| line == format!("resuming from {saved}"));
    again.signal(Signal::TERM);
    again.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
}
