//! Nodes that leave and join during a training: no step is repeated, and no sample is left out or
//! seen twice.

use std::collections::BTreeMap;

use rustix::process::Signal;

use crate::server::Etcd;
use crate::support::{Job, Program, SAMPLES, TRAINING, Traces, assert_epochs, free_port, last_pass};

struct Training {
    traces: Traces,
    backend: &'static str,
    endpoint: String,
}

impl Training {
    fn agent(&self, node_rank: &str, options: &[&str]) -> Program {
        let logs = self.traces.path("logs");
        let launcher = Program::ice_launch(["--nnodes", "1:4", "--rdzv-backend", self.backend])
            .args(["--rdzv-endpoint", &self.endpoint, "--node-rank", node_rank, "--devices", "cpu:0"])
            .args(["--run-id", "elastic", "--log-dir", &logs, "--max-restarts", "9"])
            .args(["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=1"]);
        self.traces.trainee(launcher, 1).args(options)
    }

    /// Returns all indices in the order in which they were trained on, and the number of passes
    /// that were done twice.
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

/// Waits until rank 0, which is this agent's, has done some more passes.
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
    let first = shrinks_and_grows(&["--per-rank", "4", "--repeats", "400"]);
    assert!(first.contains("from the memory of rank") && !first.contains("resuming from"), "{first}");
}

/// Leaving nodes save the state that only they have. Joining nodes have no state.
#[test]
fn so_does_one_of_whose_state_each_rank_has_a_part() {
    let first = shrinks_and_grows(&["--per-rank", "4", "--repeats", "400", "--shard-optimizer"]);
    assert!(first.contains("resuming from"), "{first}");
    for ranks in [2, 3, 4] {
        assert!(first.contains(&format!("on {ranks} ranks, from the parts of all")), "{first}");
    }
}

/// Returns the output of rank 0.
fn shrinks_and_grows(options: &[&str]) -> String {
    let endpoint = format!("127.0.0.1:{}", free_port());
    let training = Training { traces: Traces::new(), backend: "c10d", endpoint };
    let agent = |node_rank: &str| training.agent(node_rank, options).start();
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
    // A stop of the whole job ends the training at the current step.
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
    first.expect_in_stderr(&["going on with 1 node\n"]);
    assert!(
        first.stdout.contains("1 rank has the batches of the 4 that the run began with"),
        "{}",
        first.transcript()
    );
    let repeated = training.traces.rounds();
    let repeated = repeated.iter().map(|record| record["repeated_steps"].as_u64().unwrap());
    assert_eq!(repeated.sum::<u64>(), 0);
    first.stdout
}

#[test]
fn a_training_goes_on_from_memory_when_the_node_that_coordinates_is_killed() {
    let Some(etcd) = Etcd::start() else { return };
    // One node begins. There are enough samples that every rank has one at the end of an epoch: a
    // rank without samples would be recorded, too.
    let options = ["--per-rank", "12", "--repeats", "150"];
    let training = Training { traces: Traces::new(), backend: "etcd", endpoint: etcd.endpoint.clone() };
    let agent = |node_rank: &str| training.agent(node_rank, &options).start();
    // The first agent becomes the coordinator.
    let first = agent("0");
    first.wait_for_line(TRAINING, |line| line.starts_with("pass"));
    let others = [agent("1"), agent("2")];
    world_size(&first, 3);
    first.signal(Signal::KILL);
    drop(first);
    // Node 1 keeps its ranks, and the other node becomes node 0.
    world_size(&others[1], 2);
    let [other, main] = others.map(|job| job.finish(TRAINING));
    other.expect_code(0);
    main.expect_code(0);
    assert!(main.stdout.contains("on 2 ranks, from the memory of rank"), "{}", main.transcript());
    assert!(!main.stdout.contains("resuming from"), "{}", main.transcript());
    let passes = main.stdout.lines().skip_while(|line| !line.starts_with("world size 2"));
    let first_again = passes.filter_map(|line| line.strip_prefix("pass ")?.parse().ok()).next().unwrap();
    // Records of the interrupted step, which is repeated, do not count.
    let mut seen = BTreeMap::new();
    let (mut twice, mut last) = (0, 0);
    for pass in training.traces.passes() {
        if pass.number < first_again || pass.rank < 2 {
            let before = seen.insert((pass.number, pass.rank), pass.indices.unwrap());
            twice += usize::from(before.is_some());
        }
        last = last.max(pass.number);
    }
    assert!(twice <= 4, "{twice} passes were done twice\n{}", main.transcript());
    assert!(first_again < last, "{}", main.transcript());
    let order: Vec<_> = seen.into_values().flatten().collect();
    assert!(order.len() > 4 * SAMPLES, "{}", order.len());
    assert_epochs(&order);
}
