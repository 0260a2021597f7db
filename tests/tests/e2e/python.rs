//! A Python program written for torchrun runs unchanged.

use std::ffi::OsString;

use crate::support::{Finished, Program, SOON, free_port, peer, python_script};

/// Returns the lines `rank … of …` of all agents, sorted.
fn ranks(agents: &[Finished]) -> Vec<String> {
    let mut lines: Vec<String> = agents
        .iter()
        .flat_map(|agent| agent.stdout.lines())
        .filter_map(|line| Some(line[line.find("rank ")?..].to_owned()))
        .collect();
    lines.sort();
    lines
}

#[test]
fn on_one_node() {
    let Some(python) = peer("python::on_one_node") else { return };
    let outcome = Program::ice_launch([OsString::from("--devices"), "cpu:0-1".into(), python.into()])
        .arg(python_script("gloo_ddp.py"))
        .run(SOON * 2);
    outcome.expect_code(0);
    assert_eq!(
        ranks(&[outcome]),
        ["rank 0 of 2 on node 0 local 0 sum 3", "rank 1 of 2 on node 0 local 1 sum 3"]
    );
}

#[test]
fn on_two_nodes() {
    let Some(python) = peer("python::on_two_nodes") else { return };
    let port = free_port().to_string();
    let agent = |node: &str| {
        Program::ice_launch(["--nnodes", "2", "--master-addr", "127.0.0.1", "--devices", "cpu:0"])
            .args(["--master-port", &port, "--node-rank", node])
            .arg(&python)
            .arg(python_script("gloo_ddp.py"))
            .start()
    };
    // The second node may start first.
    let second = agent("1");
    let first = agent("0");
    let agents = [first.finish(SOON * 2), second.finish(SOON * 2)];
    agents.iter().for_each(|agent| _ = agent.expect_code(0));
    assert_eq!(
        ranks(&agents),
        ["rank 0 of 2 on node 0 local 0 sum 3", "rank 1 of 2 on node 1 local 0 sum 3"]
    );
}

#[test]
fn an_exception_is_reported_with_its_text() {
    let Some(python) = peer("python::an_exception_is_reported_with_its_text") else { return };
    let script = "import os\nif os.environ['RANK'] == '1': raise ValueError('no such colour')";
    let outcome = Program::ice_launch(["--devices", "cpu:0-1"]).arg(python).args(["-c", script]).run(SOON);
    outcome.expect_code(1).expect_in_stderr(&["rank 1", "ValueError: no such colour"]);
}

#[test]
fn a_timer_of_pytorch_ends_a_rank_that_spins() {
    let Some(python) = peer("python::a_timer_of_pytorch_ends_a_rank_that_spins") else { return };
    let script = "
import os, time
import torch.distributed.elastic.timer as timer
timer.configure(timer.FileTimerClient(os.environ['TORCHELASTIC_TIMER_FILE']))
with timer.expires(after=60, scope='set-up'):
    pass
if os.environ['RANK'] == '1':
    with timer.expires(after=1, scope='all-reduce'):
        while True: pass
time.sleep(600)
";
    let launch = Program::ice_launch(["--devices", "cpu:0-1"]).arg(python).args(["-c", script]);
    let outcome = launch.env("TORCHELASTIC_ENABLE_FILE_TIMER", "1").run(SOON);
    let said = ["rank 1 failed: hung: it did not release its timer `all-reduce` in time"];
    outcome.expect_code(1).expect_in_stderr(&said);
}
