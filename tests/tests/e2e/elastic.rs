//! Nodes that leave and come while a training goes on: nothing is done again, and no sample is left out or seen twice.

use std::collections::BTreeMap;

use rustix::process::Signal;

use crate::support::{Job, Program, SAMPLES, TRAINING, Traces, assert_epochs, free_port, last_pass};

struct Training {
    traces: Traces,
    port: u16,
}

impl Training {
    fn agent(&self, node_rank: &str, options: &[&str]) -> Program {
        let (endpoint, logs) = (format!("127.0.0.1:{}", self.port), self.traces.path("logs"));
        let launcher = Program::ice_launch(["--nnodes", "1:4", "--rdzv-backend", "c10d"])
            .args(["--rdzv-endpoint", &endpoint, "--node-rank", node_rank, "--devices", "cpu:0"])
            .args(["--run-id", "elastic", "--log-dir", &logs]);
        self.traces.trainee(launcher, 1).args(options)
    }

    /// All indices in the order in which they were trained on, and how many passes were done twice.
    fn order(&self) -> (Vec<usize>, usize) {
        let mut seen: BTreeMap<(u64, usize), Vec<usize>> = BTreeMap::new();
        let mut twice = 0;
        for pass in self.traces.passes() {
            let indices = pass.indices.unwrap();
            if let Some(before) = seen.insert((pass.number, pass.rank), indices.clone()) {
                assert_eq!(before, indices, "pass {} of rank {}", pass.number, pass.rank);
                twice += 1;
            }
        }
        (seen.into_values().flatten().collect(), twice)
    }
}

/// Waits until rank 0, which is this agent's, has gone on a little.
fn goes_on(job: &Job) {
    let before = last_pass(&job.output());
    job.wait_for_output(TRAINING, |text| last_pass(text) >= before + 8);
}

fn world_size(job: &Job, ranks: usize) {
    let wanted = format!("world size {ranks}");
    job.wait_for_output(TRAINING, |text| {
        text.lines().rfind(|line| line.starts_with("world size")) == Some(&*wanted)
    });
    goes_on(job);
}

#[test]
fn a_training_shrinks_from_four_nodes_to_one_and_grows_again_without_doing_anything_twice() {
    let options = ["--per-rank", "4", "--repeats", "400"];
    let training = Training { traces: Traces::new(), port: free_port() };
    let agent = |node_rank: &str| training.agent(node_rank, &options).start();
    let first = agent("0");
    let mut others = ["1", "2", "3"].map(agent).into_iter().collect::<Vec<Job>>();
    world_size(&first, 4);
    for left in [3, 2, 1] {
        let leaving = others.pop().unwrap();
        leaving.signal(Signal::TERM);
        leaving.finish(TRAINING).expect_code(143);
        world_size(&first, left);
    }
    for nodes in [2, 3, 4] {
        others.push(agent(&(nodes - 1).to_string()));
        world_size(&first, nodes);
    }
    // The job as a whole ends where it is.
    first.signal(Signal::TERM);
    let first = first.finish(TRAINING);
    first.expect_code(143);
    for other in others {
        other.finish(TRAINING);
    }
    let (order, twice) = training.order();
    assert_eq!(twice, 0, "{}", first.transcript());
    assert!(order.len() > 4 * SAMPLES, "{}", order.len());
    assert_epochs(&order);
    first.expect_in_stderr(&["going on with 1 nodes"]);
    assert!(
        first.stdout.contains("1 ranks share the batches of the 4 that the run began with"),
        "{}",
        first.transcript()
    );
    let repeated = training.traces.rounds();
    let repeated = repeated.iter().map(|record| record["repeated_steps"].as_u64().unwrap());
    assert_eq!(repeated.sum::<u64>(), 0);
}
