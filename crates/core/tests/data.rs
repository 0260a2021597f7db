//! Datasets in runs of a graph. With or without workers, a run ends with the same bits and resumes
//! with the next batch.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ice_core::data::{BatchStream, Dataset, Pass, Stream, stream};
use ice_core::optim::AdamW;
use ice_core::{
    DatasetNode, Error, HyperGraph, LossNode, ModuleNode, Node, Repeat, Result, ResumeFrom, Run, RunConfig,
    SaveCheckpoint, StreamNode, Task,
};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

/// libtorch has one random number generator per process, as if a process were one rank. Runs in
/// threads must therefore take turns.
static ONE_RUN_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Points on a line, each moved by its own random number.
struct Noisy;

impl Dataset for Noisy {
    type Batch = Tensor;

    fn len(&self) -> usize {
        22
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(indices).to_device(device).to_kind(Kind::Float).unsqueeze(1))
    }

    fn batch_in(&self, pass: &Pass, indices: &[i64], device: Device) -> Result<Tensor> {
        let noise: Vec<_> = indices.iter().map(|&index| pass.rng(index as u64).uniform() as f32).collect();
        Ok((self.batch(indices, device)? + Tensor::from_slice(&noise).to_device(device).unsqueeze(1)) / 22.0)
    }
}

/// Trains on `data` for 3 epochs, with a checkpoint after each step.
fn train(data: impl Node + 'static, out: &Path, from: Option<ResumeFrom>) -> Result<()> {
    let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut graph = HyperGraph::new();
    graph.add("x", data, "train")?;
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 3, Default::default()),
        |net, x| Ok(x.tensor("x")?.apply(net).dropout(0.5, x.is_training())),
    );
    graph.add("net", net.optimizer(AdamW::new(0.05)), "*")?;
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "train")?;
    let tasks = Repeat::new(3).then(Task::train("train")).then(SaveCheckpoint::new());
    let config = RunConfig {
        seed: 7,
        out_dir: out.to_owned(),
        save_every_steps: Some(1),
        resume_from: from,
        ..RunConfig::default()
    };
    Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config)
}

fn checkpoints(out: &Path) -> Vec<String> {
    let Ok(folder) = fs::read_dir(out.join("none_local/ckpts")) else { return Vec::new() };
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // The link `latest` is not a checkpoint.
    names.filter(|name| name.starts_with('E')).collect()
}

fn bits(out: &Path) -> [Vec<u8>; 2] {
    let steps = |name: &str| name.rsplit('S').next().unwrap().parse::<u64>().unwrap();
    let last = checkpoints(out).into_iter().max_by_key(|name| steps(name)).unwrap();
    ["model.safetensors", "optimizer-00000-of-00001.safetensors"]
        .map(|file| fs::read(out.join("none_local/ckpts").join(&last).join(file)).unwrap())
}

/// Checks that a whole run without workers, and runs with workers resumed from each of its
/// checkpoints, end with the same bits.
fn check<N: Node + 'static>(data: impl Fn(usize) -> N) {
    let whole = tempfile::tempdir().unwrap();
    train(data(0), whole.path(), None).unwrap();
    let all = checkpoints(whole.path());
    assert!(all.len() >= 15, "{all:?}");
    for (at, name) in all.iter().enumerate() {
        let resumed = tempfile::tempdir().unwrap();
        let from = ResumeFrom::Path(whole.path().join("none_local/ckpts").join(name));
        train(data([0, 1, 4][at % 3]), resumed.path(), Some(from)).unwrap();
        // The last checkpoint leaves nothing to do.
        if name != "E3S18" {
            assert_eq!(bits(whole.path()), bits(resumed.path()), "from {name}");
        }
    }
    let with_workers = tempfile::tempdir().unwrap();
    train(data(3), with_workers.path(), None).unwrap();
    assert_eq!(bits(whole.path()), bits(with_workers.path()));
}

#[test]
fn a_run_resumed_anywhere_with_any_number_of_workers_ends_with_the_same_bits() {
    check(|workers| DatasetNode::new(Noisy).shuffle(true).batch_size(4).workers(workers));
    check(|workers| {
        DatasetNode::new(Noisy)
            .shuffle(true)
            .global_batch_size(5)
            .drop_last(true)
            .batches_per_epoch(6)
            .workers(workers)
    });
}

/// Creates 22 points in 4 shards.
fn points(sized: bool) -> impl BatchStream<Batch = Tensor> {
    let points = stream(4, |shard| Ok((shard..22).step_by(4).map(Ok)));
    let points = if sized { points.of_samples(22) } else { points };
    let noisy = points.map_random(|at, rng| Ok(Tensor::from((at as f64 + rng.uniform()) / 22.0)));
    noisy.map(|point| Ok(point.to_kind(Kind::Float).unsqueeze(0))).stack()
}

#[test]
fn a_run_over_a_stream_resumed_anywhere_ends_with_the_same_bits() {
    check(|workers| StreamNode::new(points(true)).shuffle(6).batch_size(4).workers(workers));
    check(|workers| {
        StreamNode::new(points(false)).shuffle(3).global_batch_size(5).batches_per_epoch(6).workers(workers)
    });
}

#[test]
fn a_stream_without_a_size_needs_a_number_of_steps_or_iterations() {
    let out = tempfile::tempdir().unwrap();
    let message = train(StreamNode::new(points(false)), out.path(), None).unwrap_err().to_string();
    assert!(message.contains("has a size"), "{message}");
}

#[test]
fn a_stream_of_another_order_is_refused_within_a_pass() {
    let out = tempfile::tempdir().unwrap();
    let node = |buffer| StreamNode::new(points(true)).shuffle(buffer).batch_size(4);
    train(node(3), out.path(), None).unwrap();
    let within_a_pass = out.path().join("none_local/ckpts/E2S17");
    let message = train(node(4), out.path(), Some(ResumeFrom::Path(within_a_pass))).unwrap_err().to_string();
    assert!(message.contains("buffer: Some(3)") && message.contains("buffer: Some(4)"), "{message}");
    // Between two passes, the state has no position in the old order.
    train(node(4), out.path(), Some(ResumeFrom::Latest)).unwrap();
}

struct Faulty;

impl Dataset for Faulty {
    type Batch = Tensor;

    fn len(&self) -> usize {
        22
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        assert!(!indices.contains(&9), "a bug");
        Noisy.batch(indices, device)
    }
}

#[test]
fn an_error_names_the_node_and_the_sample() {
    for workers in [0, 2] {
        let out = tempfile::tempdir().unwrap();
        let data = DatasetNode::new(Faulty).batch_size(3).workers(workers);
        let error = train(data, out.path(), None).unwrap_err();
        assert!(matches!(error, Error::Node { .. }));
        assert_eq!(error.to_string(), "node `train/x`, forward: batch of samples 9, 10, 11: panicked: a bug");
        // The three earlier batches were trained on.
        assert_eq!(checkpoints(out.path()).len(), 3);
    }
}

#[test]
fn no_thread_outlives_its_run() {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        tasks
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|name| name.starts_with("ice-data"))
            .count()
    };
    let out = tempfile::tempdir().unwrap();
    train(DatasetNode::new(Noisy).batch_size(4).workers(3), out.path(), None).unwrap();
    let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    assert_eq!(threads(), 0);
}
