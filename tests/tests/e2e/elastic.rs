//! Nodes that leave and come while a training goes on: nothing is done again, and no sample is left out or seen twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

use crate::support::{Job, Program, TRAINING, built, free_port};

/// As the trainee has them.
const SAMPLES: usize = 46;

struct Training {
    folder: TempDir,
    port: u16,
}

impl Training {
    fn new() -> Self {
        let folder = tempdir().unwrap();
        fs::create_dir(folder.path().join("seen")).unwrap();
        Self { folder, port: free_port() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn agent(&self, node_rank: &str, options: &[&str]) -> Program {
        let endpoint = format!("127.0.0.1:{}", self.port);
        let (seen, out, logs) = (self.path("seen"), self.path("out"), self.path("logs"));
        Program::ice_launch(["--nnodes", "1:4", "--rdzv-backend", "c10d", "--rdzv-endpoint", &endpoint])
            .args(["--node-rank", node_rank, "--devices", "cpu:0", "--run-id", "elastic", "--log-dir", &logs])
            .arg(built("trainee"))
            .args(["--seen", &seen, "--life", "1", "--out-dir", &out])
            .args(options)
    }

    /// All indices in the order in which they were trained on, and how many passes were done twice.
    fn order(&self) -> (Vec<usize>, usize) {
        let mut seen: BTreeMap<(u64, usize), Vec<usize>> = BTreeMap::new();
        let mut twice = 0;
        for rank in 0..4 {
            let Ok(text) = fs::read_to_string(Path::new(&self.path("seen")).join(format!("rank{rank}.txt")))
            else {
                break;
            };
            for line in text.lines() {
                let mut parts = line.splitn(3, ' ');
                let pass = parts.nth(1).unwrap().parse().unwrap();
                let indices: Vec<usize> = serde_json::from_str(parts.next().unwrap()).unwrap();
                if let Some(before) = seen.insert((pass, rank), indices.clone()) {
                    assert_eq!(before, indices, "pass {pass} of rank {rank}");
                    twice += 1;
                }
            }
        }
        (seen.into_values().flatten().collect(), twice)
    }
}

fn last_pass(text: &str) -> u64 {
    text.lines().filter_map(|line| line.strip_prefix("pass ")?.parse().ok()).max().unwrap_or(0)
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
    let training = Training::new();
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
    for (number, epoch) in order.chunks_exact(SAMPLES).enumerate() {
        let mut epoch = epoch.to_vec();
        epoch.sort_unstable();
        assert!(epoch.iter().copied().eq(0..SAMPLES), "epoch {number}: {epoch:?}");
    }
    first.expect_in_stderr(&["going on with 1 nodes"]);
    assert!(
        first.stdout.contains("1 ranks share the batches of the 4 that the run began with"),
        "{}",
        first.transcript()
    );
    let rounds = fs::read_dir(training.path("logs")).unwrap().map(|entry| entry.unwrap().path());
    let rounds: Vec<_> =
        rounds.filter_map(|folder| fs::read_to_string(folder.join("rounds.jsonl")).ok()).collect();
    let records = rounds.iter().flat_map(|text| text.lines()).map(|line| serde_json::from_str(line).unwrap());
    let repeated = records.map(|record: serde_json::Value| record["repeated_steps"].as_u64().unwrap());
    assert_eq!(repeated.sum::<u64>(), 0);
}
