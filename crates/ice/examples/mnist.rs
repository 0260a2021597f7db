//! Trains a small convolutional network to read handwritten digits, on all given devices.
//!
//!     cargo run --release --example mnist -- --devices cpu:0-1

use std::path::PathBuf;
use std::process::ExitCode;

use ice::prelude::*;

#[derive(Parser)]
#[command(about = "Trains a convolutional network on MNIST")]
struct Options {
    /// Folder with the four MNIST files.
    #[arg(long, value_name = "DIR", default_value = ".deps/mnist")]
    data: PathBuf,
    /// Times to go through the training images.
    #[arg(long, default_value_t = 3)]
    epochs: u64,
    /// Images per rank and step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Threads per rank that make batches ahead.
    #[arg(long, default_value_t = 0)]
    workers: usize,
    /// Learning rate of AdamW.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Share of activations that dropout zeroes.
    #[arg(long, default_value_t = 0.25)]
    dropout: f64,
    /// Steps per epoch. Default: one pass over the images.
    #[arg(long)]
    steps: Option<u64>,
    #[command(flatten)]
    run: RunOptions,
}

struct Net {
    conv1: nn::Conv2d,
    conv2: nn::Conv2d,
    channels: nn::Dropout2d,
    fc1: nn::Linear,
    dropout: nn::Dropout,
    fc2: nn::Linear,
}

impl Net {
    fn new(path: &nn::Path, dropout: f64) -> Self {
        Self {
            conv1: nn::Conv2d::new(path / "conv1", 1, 10, 5),
            conv2: nn::Conv2d::new(path / "conv2", 10, 20, 5),
            channels: nn::Dropout2d::new(dropout),
            fc1: nn::Linear::new(path / "fc1", 320, 50),
            dropout: nn::Dropout::new(dropout),
            fc2: nn::Linear::new(path / "fc2", 50, 10),
        }
    }

    /// Maps images `[n, 1, 28, 28]` to log-probabilities `[n, 10]`.
    fn forward(&self, images: &Tensor, train: bool) -> Tensor {
        let x = images.apply(&self.conv1).max_pool2d_default(2).relu();
        let x = x.apply(&self.conv2).apply_t(&self.channels, train).max_pool2d_default(2).relu();
        let x = x.view([-1, 320]).apply(&self.fc1).relu().apply_t(&self.dropout, train);
        x.apply(&self.fc2).log_softmax(-1, Kind::Float)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| train(&options))
}

fn train(options: &Options) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    graph
        .hparam("lr", options.lr)
        .hparam("batch_size", options.batch_size)
        .hparam("dropout", options.dropout);

    // Two datasets share the name `digits`: the tags select the one that a task uses.
    let learn = Mnist::open(&options.data, Split::Train)?;
    let test = Mnist::open(&options.data, Split::Test)?;
    let learn = DatasetNode::new(learn).shuffle(true).batch_size(options.batch_size).workers(options.workers);
    let test = DatasetNode::new(test).batch_size(500).workers(options.workers);
    graph.add("digits", learn, "train")?.add("digits", test, "val")?;

    let dropout = options.dropout;
    let net = ModuleNode::new(
        move |path| Net::new(path, dropout),
        |net, x| Ok(net.forward(&x.get::<Labelled>("digits")?.images, x.is_training())),
    );
    graph.add("net", net.optimizer(AdamW::new(options.lr)), "*")?;

    let nll = LossNode::new(|x| Ok(x.tensor("net")?.nll_loss(&x.get::<Labelled>("digits")?.labels)));
    graph.add("nll", nll, "*")?;

    let accuracy = MetricNode::average(|x| {
        let guesses = x.tensor("net")?.argmax(-1, false);
        Ok(guesses.eq_tensor(&x.get::<Labelled>("digits")?.labels))
    });
    graph.add("accuracy", accuracy, "val")?;

    let learn = match options.steps {
        Some(steps) => Task::train("train").steps(steps),
        None => Task::train("train").epochs(1),
    };
    let epoch = Repeat::new(options.epochs).then(learn).then(Task::eval("val")).then(SaveCheckpoint::new());
    let tasks = Repeat::once().then(epoch).call(|run| {
        if run.is_main() {
            println!("val accuracy {:.4}", run.measure("val/accuracy")?);
        }
        Ok(())
    });
    graph.run(tasks, &options.run)
}
