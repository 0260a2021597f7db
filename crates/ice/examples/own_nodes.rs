//! Nodes, a dataset and a meter of a program's own. A small network learns to tell two spirals
//! apart, from points with less and less noise.
//!
//!     cargo run --release --example own_nodes -- --devices cpu:0-1
//!
//! With `--predict out/…`, the program uses a network that such a run has trained.

use std::f32::consts::TAU;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ice::core::meter::Meter;
use ice::core::{Context, Error, Measure, Node, NodeState, Result, Value, Worker};
use ice::prelude::*;
use serde_json::{Value as Json, json};
use tch::Device;

#[derive(Parser)]
#[command(about = "Trains on two spirals, with nodes of its own")]
struct Options {
    /// Times to go through the points.
    #[arg(long, default_value_t = 30)]
    epochs: u64,
    /// Print the spirals of three points, with the network in the folder of a run or of a
    /// checkpoint.
    #[arg(long, value_name = "DIR")]
    predict: Option<PathBuf>,
    #[command(flatten)]
    run: RunOptions,
}

// ANCHOR: dataset
/// Points of two spirals.
struct Spirals {
    count: usize,
}

impl Spirals {
    /// Where the point of this index is, and on which spiral.
    fn point(&self, index: i64) -> ([f32; 2], i64) {
        let class = index % 2;
        let radius = (index + 1) as f32 / self.count as f32;
        let angle = radius * 1.5 * TAU + class as f32 * TAU / 2.0;
        ([radius * angle.cos(), radius * angle.sin()], class)
    }
}

impl Dataset for Spirals {
    /// Points, float `[n, 2]`, and which spiral each is of, int64 `[n]`.
    type Batch = (Tensor, Tensor);

    fn len(&self) -> usize {
        self.count
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch> {
        let (points, classes): (Vec<_>, Vec<_>) = indices.iter().map(|index| self.point(*index)).unzip();
        let points = Tensor::from_slice(points.as_flattened()).view([-1, 2]);
        Ok((points.to_device(device), Tensor::from_slice(&classes).to_device(device)))
    }
}
// ANCHOR_END: dataset

// ANCHOR: node
/// The points with noise while training, less of it with every step: its deviation is `start × decay^steps`.
struct Noise {
    start: f64,
    decay: f64,
    steps: u64,
    is_training: bool,
}

impl Node for Noise {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let points = &x.get::<(Tensor, Tensor)>("spirals")?.0;
        self.is_training = x.is_training();
        if !self.is_training {
            return Ok(Value::new(points.shallow_clone()));
        }
        let deviation = self.start * self.decay.powi(self.steps as i32);
        Ok(Value::new(points + points.randn_like() * deviation))
    }

    /// A step counts only now: one in which a rank is lost is done again.
    fn step_end(&mut self) -> Result<()> {
        self.steps += u64::from(self.is_training);
        Ok(())
    }

    fn state(&self) -> NodeState {
        NodeState { values: json!(self.steps), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        let steps = saved.values.as_u64();
        self.steps = steps.ok_or_else(|| Error::Resume(format!("noise after {} steps", saved.values)))?;
        Ok(())
    }
}
// ANCHOR_END: node

// ANCHOR: meter
/// The largest element of an epoch, over all ranks.
#[derive(Default)]
struct Largest(Option<f64>);

impl Meter for Largest {
    type Input = Tensor;

    fn reset(&mut self) {
        self.0 = None;
    }

    fn update(&mut self, values: &Tensor) -> Result<()> {
        let largest = values.max().double_value(&[]);
        self.0 = Some(self.0.map_or(largest, |so_far| so_far.max(largest)));
        Ok(())
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        let options = (Kind::Double, worker.device());
        let own = Tensor::full([1], self.0.unwrap_or(f64::NEG_INFINITY), options);
        let all: Vec<Tensor> = (0..worker.world_size()).map(|_| own.empty_like()).collect();
        worker.all_gather(&all, &own)?;
        let largest = Tensor::cat(&all, 0).max().double_value(&[]);
        self.0 = (largest > f64::NEG_INFINITY).then_some(largest);
        Ok(())
    }

    fn evaluate(&self) -> Result<Measure> {
        Ok(self.0.unwrap_or(f64::NAN).into())
    }

    fn state(&self) -> Json {
        json!(self.0)
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.0 = state.as_f64();
        Ok(())
    }
}
// ANCHOR_END: meter

/// Returns the spiral of each point of the batch, int64 `[n]`.
fn classes(x: &Outputs<'_>) -> Result<Tensor> {
    Ok(x.get::<(Tensor, Tensor)>("spirals")?.1.shallow_clone())
}

// ANCHOR: net
/// Makes float `[n, 2]`, how much each point looks like one of each spiral, of the output of `noise`.
fn net() -> ModuleNode<nn::Sequential, Tensor> {
    ModuleNode::new(
        |path| {
            nn::seq()
                .add(nn::Linear::new(path / "in", 2, 64))
                .add_fn(|x| x.tanh())
                .add(nn::Linear::new(path / "middle", 64, 64))
                .add_fn(|x| x.tanh())
                .add(nn::Linear::new(path / "out", 64, 2))
        },
        |net, x| Ok(net.forward(&x.tensor("noise")?)),
    )
}
// ANCHOR_END: net

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| match &options.predict {
        Some(trained) => predict(trained),
        None => train(&options),
    })
}

// ANCHOR: predict
/// Says which spiral a point is of, with what a run has trained.
fn predict(trained: &Path) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    graph.add("net", net(), "*")?;
    let eager = graph.eager(Device::Cpu, 0)?;
    eager.load(trained)?;

    let points = Tensor::from_slice2(&[[0.0_f32, 0.25], [0.0, -0.25], [-0.5, 0.0]]);
    eager.set_input("noise", points);
    let likelihood = eager.forward("*", |x| Ok(x.tensor("net")?.softmax(1, Kind::Float)))?;
    likelihood.print();
    Ok(())
}
// ANCHOR_END: predict

fn train(options: &Options) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    // ANCHOR: graph
    let learn = DatasetNode::new(Spirals { count: 2000 }).shuffle(true).batch_size(50);
    let test = DatasetNode::new(Spirals { count: 500 }).batch_size(100);
    graph.add("spirals", learn, "train")?.add("spirals", test, "val")?;
    graph.add("noise", Noise { start: 0.05, decay: 0.997, steps: 0, is_training: false }, "*")?;

    graph.add("net", net().optimizer(AdamW::new(5e-3)), "*")?;

    let loss = LossNode::new(|x| Ok(x.tensor("net")?.cross_entropy_for_logits(&classes(x)?)));
    graph.add("loss", loss, "train")?;

    let accuracy = MetricNode::accuracy(1, |x| Ok((x.tensor("net")?, classes(x)?)));
    let worst = MetricNode::new(Largest::default(), |x| {
        let likelihood = x.tensor("net")?.log_softmax(1, Kind::Float);
        Ok(-likelihood.gather(1, &classes(x)?.unsqueeze(1), false))
    });
    graph.add("accuracy", accuracy, "val")?.add("worst", worst, "val")?;
    // ANCHOR_END: graph

    // ANCHOR: tasks
    let learn = Repeat::new(options.epochs).then(Task::train("train")).then(SaveCheckpoint::new());
    let tasks = Repeat::once().then(learn).then(Task::eval("val")).call(|run| {
        if run.is_main() {
            let (accuracy, worst) = (run.measure("val/accuracy")?, run.measure("val/worst")?);
            println!("val accuracy {accuracy:.4}, largest loss of a point {worst:.2}");
        }
        Ok(())
    });
    graph.run(tasks, &options.run)
    // ANCHOR_END: tasks
}
