//! A job gives the same bits, however it is started, and if it is interrupted and resumed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ice_proto::exit::ExitCode;
use rustix::process::Signal;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use tempfile::tempdir;

use crate::support::{Program, TRAINING, built, checkpoints, free_port, mnist_data, wait_until};

/// Arguments of the example.
#[derive(Clone)]
pub(crate) struct Run {
    out_dir: PathBuf,
    arguments: Vec<String>,
}

impl Run {
    pub(crate) fn new(out_dir: &Path) -> Self {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = vec!["--data".into(), path(&mnist_data()), "--out-dir".into(), path(out_dir)];
        Self { out_dir: out_dir.to_owned(), arguments }
    }

    pub(crate) fn args<const N: usize>(mut self, arguments: [&str; N]) -> Self {
        self.arguments.extend(arguments.map(str::to_owned));
        self
    }

    /// One epoch of this number of steps.
    pub(crate) fn steps(self, steps: u32) -> Self {
        self.args(["--epochs", "1", "--steps", &steps.to_string()])
    }

    /// Returns the example under `ice-launch` with these options.
    pub(crate) fn under_ice_launch(&self, options: &[&str]) -> Program {
        Program::ice_launch(options).arg(built("mnist")).args(&self.arguments)
    }

    /// Returns the example that launches itself.
    pub(crate) fn by_itself(&self, options: &[&str]) -> Program {
        Program::new(built("mnist")).args(options).args(&self.arguments)
    }

    /// Returns the path of the parameters in the checkpoint with the most training steps.
    pub(crate) fn newest_model(&self) -> PathBuf {
        let newest =
            self.checkpoints().pop().unwrap_or_else(|| panic!("no checkpoint in {:?}", self.out_dir));
        newest.join("model.safetensors")
    }

    fn checkpoints(&self) -> Vec<PathBuf> {
        checkpoints(&self.out_dir)
    }
}

/// Returns the tensors of a safetensors file by name.
pub(crate) fn parameters(model: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(model).unwrap_or_else(|error| panic!("{model:?}: {error}"));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |bytes: &[u8]| {
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    };
    tensors
        .iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
            (name.to_owned(), floats(tensor.data()))
        })
        .collect()
}

/// Returns the largest difference between two parameters at the same place.
pub(crate) fn difference(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f32 {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let pairs = a.values().zip(b.values()).flat_map(|(a, b)| a.iter().zip(b));
    // `max` would ignore a NaN.
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |most, now| if now <= most { most } else { now })
}

#[track_caller]
pub(crate) fn assert_same_bits(expected: &Run, actual: &Run) {
    let (expected, actual) = (expected.newest_model(), actual.newest_model());
    assert_eq!(expected.parent().unwrap().file_name(), actual.parent().unwrap().file_name());
    let same = fs::read(&expected).unwrap() == fs::read(&actual).unwrap();
    assert!(
        same,
        "{expected:?} and {actual:?} differ by {}",
        difference(&parameters(&expected), &parameters(&actual))
    );
}

#[test]
fn three_ways_to_start_give_the_same_bits() {
    let folder = tempdir().unwrap();
    let run = |name: &str| Run::new(&folder.path().join(name)).steps(25);

    let by_itself = run("itself");
    by_itself.by_itself(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);

    let launched = run("launched");
    launched.under_ice_launch(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);
    assert_same_bits(&by_itself, &launched);

    let nodes = run("nodes");
    let port = free_port().to_string();
    let agent = |node: &str| {
        let network =
            ["--nnodes", "2", "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", &port];
        nodes.under_ice_launch(&[&network[..], &["--devices", "cpu:0"]].concat()).start()
    };
    let (first, second) = (agent("0"), agent("1"));
    first.finish(TRAINING).expect_code(0);
    second.finish(TRAINING).expect_code(0);
    assert_same_bits(&by_itself, &nodes);

    let other = run("other").args(["--seed", "1"]);
    other.by_itself(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);
    let (one, two) = (parameters(&by_itself.newest_model()), parameters(&other.newest_model()));
    assert!(difference(&one, &two) > 0.0, "the check sees another seed");
}

#[test]
fn interrupted_and_resumed_gives_the_same_bits() {
    let folder = tempdir().unwrap();
    let run = |name: &str| Run::new(&folder.path().join(name)).args(["--epochs", "2", "--steps", "150"]);
    let launch = ["--devices", "cpu:0-1", "--run-id", "digits"];

    let whole = run("whole");
    whole.under_ice_launch(&launch).run(TRAINING).expect_code(0);

    let halved = run("halved");
    let job = halved.under_ice_launch(&launch).start();
    wait_until(TRAINING, "the first epoch's checkpoint", || !halved.checkpoints().is_empty());
    job.signal(Signal::TERM);
    let interrupted = job.finish(TRAINING);
    interrupted.expect_code(ExitCode::Signal(15).code().into());
    let ended = |folder: &PathBuf| folder.ends_with("E2S300");
    assert!(!halved.checkpoints().iter().any(ended), "not stopped: {}", interrupted.transcript());

    let resumed = halved.clone().args(["--resume-from", "latest"]).under_ice_launch(&launch).run(TRAINING);
    resumed.expect_code(0);
    assert!(resumed.stdout.contains("resuming from"), "{}", resumed.transcript());
    assert_same_bits(&whole, &halved);
}

#[test]
fn a_checkpoint_that_all_ranks_wrote_gives_the_same_bits() {
    let folder = tempdir().unwrap();
    let run = |name: &str| Run::new(&folder.path().join(name)).steps(25);
    let whole = run("whole");
    whole.by_itself(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);

    let split = run("split").args(["--split-checkpoints", "--save-every-steps", "20"]);
    split.by_itself(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);
    let saved = split.checkpoints().into_iter().find(|folder| folder.ends_with("E0S20")).unwrap();
    for name in ["model-00001-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"] {
        assert!(saved.join(name).is_file(), "{name}");
    }
    let resumed = run("resumed").args(["--resume-from", saved.to_str().unwrap()]);
    resumed.by_itself(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);
    assert_same_bits(&whole, &resumed);
}
