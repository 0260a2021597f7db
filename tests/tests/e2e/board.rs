//! Events of a run, read by TensorBoard itself.

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ice::core::data::Dataset;
use ice::core::optim::Sgd;
use ice::core::{
    DatasetNode, HyperGraph, LossNode, MetricNode, ModuleNode, Repeat, ResumeFrom, Run, RunConfig, Task,
};
use ice_proto::exit::ExitCode;
use ice_worker::Worker;
use rustix::process::Signal;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, nn};
use tempfile::tempdir;

use crate::forms;
use crate::support::{Program, SOON, TRAINING, peer, python_script, wait_until};

/// Exit code of the script if TensorBoard is not installed.
const NO_TENSORBOARD: i32 = 77;

/// Returns the events that TensorBoard finds in a folder. `None` after printing why a test is
/// skipped.
fn read(test: &str, folder: &Path, cut: bool) -> Option<Value> {
    let program = Program::new(peer(test)?).arg(python_script("read_events.py")).arg(folder);
    let read = if cut { program.arg("--cut") } else { program }.run(SOON);
    let wanted = std::env::var("ICE_TEST_PEER").is_ok_and(|value| value == "1");
    if read.code == Some(NO_TENSORBOARD) && !wanted {
        println!("skipped {test}: no TensorBoard in .deps/peer (scripts/setup --peer installs it)");
        return None;
    }
    read.expect_code(0);
    Some(serde_json::from_str(&read.stdout).unwrap())
}

/// The points 0, 1/24, 2/24, … as `[1]` each.
struct Line;

const POINTS: usize = 24;

impl Dataset for Line {
    type Batch = Tensor;

    fn len(&self) -> usize {
        POINTS
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor, ice::core::Error> {
        Ok(Tensor::from_slice(indices).to_device(device).to_kind(Kind::Float).unsqueeze(1) / POINTS as f64)
    }
}

/// Trains two epochs of 6 steps. The parameters do not change, so that all losses are known.
fn run(out: &Path, from: Option<&str>) {
    let mut graph = HyperGraph::new();
    graph.hparam("lr", 0.0).hparam("model", "line").hparam("shuffle", false);
    graph.add("x", DatasetNode::new(Line).batch_size(4), "*").unwrap();
    let net = ModuleNode::new(
        |path| {
            let layer = nn::linear(path / "layer", 1, 4, Default::default());
            tch::no_grad(|| {
                layer.ws.shallow_clone().copy_(&Tensor::from_slice(&[1.0_f32, 1.0, 0.5, 1.5]).unsqueeze(1));
                let _ = layer.bs.as_ref().unwrap().shallow_clone().zero_();
            });
            layer
        },
        |net, x| Ok(x.tensor("x")?.apply(net)),
    );
    let net = net.optimizer(Sgd::new(0.0)).clip_grad_norm(f64::INFINITY).histograms(true);
    graph.add("net", net, "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.mean(Kind::Float))), "*").unwrap();
    let scores = MetricNode::dict(|x| Ok(vec![("f1", x.tensor("x")?), ("half", x.tensor("x")? / 2.0)]));
    graph.add("scores", scores, "val").unwrap();
    let tasks = Repeat::new(2).then(Task::train("train")).then(Task::eval("val"));
    let config = RunConfig {
        out_dir: out.to_owned(),
        save_every_steps: Some(1),
        resume_from: from.map(|name| ResumeFrom::Path(out.join("none_local/ckpts").join(name))),
        log_every: NonZeroU64::new(2),
        ..RunConfig::default()
    };
    Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
}

#[track_caller]
fn check(read: &Value, tag: &str, expected: &[(u64, f64)]) {
    let found = read["scalars"][tag].as_array().unwrap_or_else(|| panic!("no {tag} in {read:#}"));
    let steps: Vec<_> = found.iter().map(|point| point[0].as_u64().unwrap()).collect();
    assert_eq!(steps, expected.iter().map(|(step, _)| *step).collect::<Vec<_>>(), "{tag}");
    for (point, (step, value)) in found.iter().zip(expected) {
        let found = point[1].as_f64().unwrap();
        assert!((found - value).abs() < 1e-6, "{tag} at {step}: {found} and not {value}");
    }
}

/// Checks the events of an uninterrupted run.
fn check_all(read: &Value) {
    // The mean of the points of a step. An epoch has 6 steps.
    let loss = |step: u64| (step, (((step - 1) % 6) as f64 * 4.0 + 1.5) / 24.0);
    check(read, "train_step/loss", &[2, 4, 6, 8, 10, 12].map(loss));
    check(read, "train_step/net.lr", &[2, 4, 6, 8, 10, 12].map(|step| (step, 0.0)));
    // Each of the 4 outputs has a quarter of the gradient, and its weight has that quarter times
    // the mean of the points.
    let norm = |step| (step, 0.5 * f64::hypot(1.0, loss(step).1));
    check(read, "train_step/net.gradient_norm", &[2, 4, 6, 8, 10, 12].map(norm));
    let mean = 11.5 / 24.0;
    for tag in ["train/loss", "val/loss", "val/scores", "val/scores.f1"] {
        check(read, tag, &[(6, mean), (12, mean)]);
    }
    check(read, "val/scores.half", &[(6, mean / 2.0), (12, mean / 2.0)]);
    for tag in ["train/epoch", "val/epoch"] {
        check(read, tag, &[(6, 1.0), (12, 2.0)]);
    }
    let speeds = read["scalars"]["train_step/samples_per_second"].as_array().unwrap();
    assert!(speeds.len() == 6 && speeds.iter().all(|point| point[1].as_f64() > Some(0.0)), "{speeds:?}");
    let weights = |step: u64| json!([step, 4.0, 4.0, 0.5, 1.5, 4.0, 4.5, 0]);
    assert_eq!(read["histograms"]["net/layer.weight"], json!([weights(6), weights(12)]));
    let zeros = |step: u64| json!([step, 4.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0]);
    assert_eq!(read["histograms"]["net/layer.bias"], json!([zeros(6), zeros(12)]));
    assert_eq!(read["histograms"].as_object().unwrap().len(), 4, "gradients, too: {}", read["histograms"]);
    let hparams = json!({"lr": 0.0, "model": "line", "shuffle": false, "seed": 0.0, "world_size": 1.0});
    assert_eq!(read["hparams"], hparams);
    assert_eq!((&read["status"], &read["version"]), (&json!(1), &json!(2.0)));
}

#[test]
fn tensorboard_reads_what_a_run_shows_resumed_or_not_and_cut_off() {
    let test = "reading event files";
    let out = tempdir().unwrap();
    run(out.path(), None);
    let folder = out.path().join("none_local");
    let Some(whole) = read(test, &folder, true) else { return };
    check_all(&whole);
    let counts: Vec<_> = whole["cut"][0].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    // Each lost byte costs at most the record that contained it.
    assert!(counts[0] == counts[1] + 1, "{counts:?}");
    assert!(counts.windows(2).all(|pair| pair[0] == pair[1] || pair[0] == pair[1] + 1), "{counts:?}");

    // The run resumes in the middle of the second epoch, in the same folder.
    run(out.path(), Some("E1S8"));
    let resumed = read(test, &folder, false).unwrap();
    assert_eq!(resumed["files"].as_array().unwrap().len(), 2);
    check_all(&resumed);
}

#[test]
fn a_job_that_is_stopped_has_shown_what_it_did() {
    let folder = tempdir().unwrap();
    let run = forms::Run::new(folder.path()).args([
        "--epochs",
        "1",
        "--steps",
        "100000",
        "--save-every-steps",
        "20",
        "--log-every",
        "10",
    ]);
    let job = run.under_ice_launch(&["--devices", "cpu:0-1", "--run-id", "digits"]).start();
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).map_or(Vec::new(), |all| all.map(|entry| entry.unwrap().path()).collect())
    };
    let run_folder = || entries(folder.path()).pop();
    let saved = || run_folder().is_some_and(|run| entries(&run.join("ckpts")).len() > 1);
    wait_until(TRAINING, "two checkpoints", saved);
    job.signal(Signal::TERM);
    job.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
    let run_folder = run_folder().unwrap();
    let Some(read) = read("reading the events of a job", &run_folder, false) else { return };
    assert_eq!(read["files"].as_array().unwrap().len(), 1, "rank 0 alone writes");
    let losses = read["scalars"]["train_step/nll"].as_array().unwrap();
    let steps: Vec<_> = losses.iter().map(|point| point[0].as_u64().unwrap()).collect();
    let last = entries(&run_folder.join("ckpts"))
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.split_once('S')?.1.parse::<u64>().ok())
        .max()
        .unwrap();
    assert_eq!(steps, (1..=last / 10).map(|tens| tens * 10).collect::<Vec<_>>(), "saved last: {last}");
    assert_eq!((&read["hparams"]["world_size"], read.get("status")), (&json!(2.0), None));
}
