//! Runs of a small graph on one process: what is saved, what is found again, and what is refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ice_core::data::Dataset;
use ice_core::optim::AdamW;
use ice_core::{
    Checkpoint, DatasetNode, HyperGraph, LossNode, ModuleNode, Repeat, Result, ResumeFrom, Run, RunConfig,
    SaveCheckpoint, Task,
};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

/// `samples` points on a line.
struct Line(usize);

impl Dataset for Line {
    type Batch = Tensor;

    fn len(&self) -> usize {
        self.0
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(indices).to_device(device).to_kind(Kind::Float).unsqueeze(1) / self.0 as f64)
    }
}

fn graph(samples: usize) -> HyperGraph {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(samples)).shuffle(true).batch_size(4), "train").unwrap();
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 3, Default::default()),
        |net, x| Ok(x.tensor("x")?.apply(net).dropout(0.5, x.is_training())),
    );
    graph.add("net", net.optimizer(AdamW::new(0.05)), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "train").unwrap();
    graph
}

fn tasks(epochs: u64) -> Repeat {
    Repeat::new(epochs).then(Task::train("train")).then(SaveCheckpoint::new())
}

/// libtorch has one random number generator per process, and a rank is a process: runs in threads must take turns.
static ONE_RUN_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Options<'a> {
    out: &'a Path,
    samples: usize,
    epochs: u64,
    every: Option<u64>,
    from: Option<ResumeFrom>,
    seed: u64,
}

impl<'a> Options<'a> {
    fn new(out: &'a Path) -> Self {
        Self { out, samples: 22, epochs: 3, every: None, from: None, seed: 7 }
    }

    fn run(self) -> Result<()> {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let config = RunConfig {
            seed: self.seed,
            out_dir: self.out.to_owned(),
            save_every_steps: self.every,
            resume_from: self.from,
            ..RunConfig::default()
        };
        let worker = Rc::new(Worker::alone(Device::Cpu));
        Run::execute(&graph(self.samples), &tasks(self.epochs), worker, config)
    }
}

fn saved(out: &Path, name: &str) -> PathBuf {
    out.join("none_local/ckpts").join(name)
}

fn bits(out: &Path, name: &str) -> [Vec<u8>; 2] {
    ["model.safetensors", "optimizer-00000-of-00001.safetensors"]
        .map(|file| fs::read(saved(out, name).join(file)).unwrap())
}

#[test]
fn a_run_resumed_anywhere_ends_with_the_same_bits() {
    let whole = tempfile::tempdir().unwrap();
    Options { every: Some(1), ..Options::new(whole.path()) }.run().unwrap();
    // 22 samples by 4 are 6 steps per epoch; E0S4 lies within the first, E1S6 at the end of it.
    for from in ["E0S1", "E0S4", "E1S6", "E1S11", "E2S17"] {
        let resumed = tempfile::tempdir().unwrap();
        let from = Some(ResumeFrom::Path(saved(whole.path(), from)));
        Options { from, ..Options::new(resumed.path()) }.run().unwrap();
        assert_eq!(bits(whole.path(), "E3S18"), bits(resumed.path(), "E3S18"));
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let out = tempfile::tempdir().unwrap();
    Options::new(out.path()).run().unwrap();
    let newest =
        |out: &Path| Checkpoint::find(&ResumeFrom::Latest, out, "none").map(|found| found.path().to_owned());
    assert_eq!(newest(out.path()).unwrap(), saved(out.path(), "E3S18"));

    let file = saved(out.path(), "E3S18").join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(newest(out.path()).unwrap(), saved(out.path(), "E2S12"));
    let message = Checkpoint::open(&saved(out.path(), "E3S18")).err().unwrap().to_string();
    assert!(message.contains("model.safetensors") && message.contains("damaged"), "{message}");

    fs::write(saved(out.path(), "E2S12").join("manifest.json"), "{").unwrap();
    fs::remove_file(saved(out.path(), "E1S6").join("optimizer-00000-of-00001.safetensors")).unwrap();
    let error = newest(out.path()).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("no valid checkpoint"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_loaded() {
    let out = tempfile::tempdir().unwrap();
    Options { epochs: 2, ..Options::new(out.path()) }.run().unwrap();
    let from = || Some(ResumeFrom::Latest);
    for (options, named) in [
        (Options { from: from(), seed: 8, ..Options::new(out.path()) }, "--seed 7"),
        (Options { from: from(), samples: 23, ..Options::new(out.path()) }, "22 samples"),
        (Options { from: from(), epochs: 0, ..Options::new(out.path()) }, "only 0"),
    ] {
        let message = options.run().unwrap_err().to_string();
        assert!(message.contains(named), "{message}");
    }
}
