//! Several agents, one job.

use rustix::process::Signal;

use crate::STAY;
use crate::support::{Job, free_port, launch};

fn node<'a>(rank: &'a str, port: &'a str) -> Vec<&'a str> {
    vec!["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", port]
}

#[test]
fn two_nodes_are_one_job() {
    let port = free_port();
    let script = "echo \"rank $RANK of $WORLD_SIZE on node $GROUP_RANK of $GROUP_WORLD_SIZE\"";
    let [second, first] = ["1", "0"].map(|rank| Job::start(launch(&node(rank, &port), script)));
    let (first, second) = (first.finish(), second.finish());
    assert_eq!(first.expect(0, &[]).stdout, ["rank 0 of 2 on node 0 of 2"]);
    assert_eq!(second.expect(0, &[]).stdout, ["rank 1 of 2 on node 1 of 2"]);
}

#[test]
fn a_failure_on_one_node_ends_the_other() {
    let port = free_port();
    let script = format!("[ $RANK = 1 ] || {STAY}; exit 9");
    let [first, second] = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
    first.finish().expect(1, &["the job is over", "node 1", "exit code 9"]);
    second.finish().expect(9, &["rank 1 failed: exit code 9"]);
}

#[test]
fn a_lost_agent_ends_the_other_with_a_reason() {
    for (lost, reason) in [(0, "lost the coordinator at 127.0.0.1:"), (1, "lost node 1")] {
        let port = free_port();
        let script = format!("echo ready; {STAY}");
        let mut jobs = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
        jobs.iter_mut().for_each(|job| _ = job.expect_line("ready"));
        jobs[lost].signal(Signal::KILL);
        let [first, second] = jobs.map(Job::finish);
        let (lost, other) = if lost == 0 { (first, second) } else { (second, first) };
        assert_eq!(lost.signal, Some(Signal::KILL.as_raw()), "{lost:#?}");
        other.expect(1, &[reason]);
    }
}
