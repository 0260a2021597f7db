//! Trains a small residual network to read handwritten digits. Its layers have torchvision's names.
//! Its batch norms take their statistics from each rank's batch, or from the batches of all ranks
//! with `--sync-batch-norm`.
//!
//!     cargo run --release --example resnet -- --devices cpu:0-1 --sync-batch-norm

use std::path::PathBuf;
use std::process::ExitCode;

use ice::prelude::*;

#[derive(Parser)]
#[command(about = "Trains a residual network on MNIST")]
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
    /// Learning rate of SGD.
    #[arg(long, default_value_t = 0.05)]
    lr: f64,
    /// Take the statistics of batch norms over all ranks.
    #[arg(long)]
    sync_batch_norm: bool,
    /// Compute with 64 bits, for comparisons: small differences grow a thousandfold in a few steps
    /// of such a network.
    #[arg(long)]
    double: bool,
    /// Steps per epoch. Default: one pass over the images.
    #[arg(long)]
    steps: Option<u64>,
    #[command(flatten)]
    run: RunOptions,
}

/// Two convolutions, and a connection around them (He et al., 2015).
#[derive(Debug)]
struct BasicBlock {
    conv1: nn::Conv2d,
    bn1: nn::BatchNorm2d,
    conv2: nn::Conv2d,
    bn2: nn::BatchNorm2d,
    downsample: Option<(nn::Conv2d, nn::BatchNorm2d)>,
}

impl BasicBlock {
    fn new(path: &nn::Path, channels: i64, features: i64, stride: i64) -> Self {
        let conv = |name: &str, channels, stride| {
            nn::Conv2d::options(channels, features, 3)
                .stride(stride)
                .padding(1)
                .bias(false)
                .build(path / name)
        };
        let norm = |path: nn::Path| nn::BatchNorm2d::new(path, features);
        let downsample = |path: nn::Path| {
            let conv =
                nn::Conv2d::options(channels, features, 1).stride(stride).bias(false).build(&path / "0");
            (conv, norm(&path / "1"))
        };
        Self {
            conv1: conv("conv1", channels, stride),
            bn1: norm(path / "bn1"),
            conv2: conv("conv2", features, 1),
            bn2: norm(path / "bn2"),
            downsample: (channels != features || stride != 1).then(|| downsample(path / "downsample")),
        }
    }
}

impl nn::ModuleT for BasicBlock {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let out = x.apply(&self.conv1).apply_t(&self.bn1, train).relu();
        let out = out.apply(&self.conv2).apply_t(&self.bn2, train);
        let around = match &self.downsample {
            Some((conv, norm)) => x.apply(conv).apply_t(norm, train),
            None => x.shallow_clone(),
        };
        (out + around).relu()
    }
}

struct ResNet {
    conv1: nn::Conv2d,
    bn1: nn::BatchNorm2d,
    layers: [BasicBlock; 3],
    fc: nn::Linear,
}

impl ResNet {
    fn new(path: &nn::Path) -> Self {
        let block = |name: &str, channels, features, stride| {
            BasicBlock::new(&(path / name / "0"), channels, features, stride)
        };
        Self {
            conv1: nn::Conv2d::options(1, 16, 3).padding(1).bias(false).build(path / "conv1"),
            bn1: nn::BatchNorm2d::new(path / "bn1", 16),
            layers: [block("layer1", 16, 16, 1), block("layer2", 16, 32, 2), block("layer3", 32, 64, 2)],
            fc: nn::Linear::new(path / "fc", 64, 10),
        }
    }

    /// Maps images `[n, 1, 28, 28]` to logits `[n, 10]`.
    fn forward(&self, images: &Tensor, train: bool) -> Tensor {
        let x = images.apply(&self.conv1).apply_t(&self.bn1, train).relu();
        let x = self.layers.iter().fold(x, |x, layer| x.apply_t(layer, train));
        x.adaptive_avg_pool2d([1, 1]).flatten(1, -1).apply(&self.fc)
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
        .hparam("sync_batch_norm", options.sync_batch_norm);

    let learn = DatasetNode::new(Mnist::open(&options.data, Split::Train)?);
    let test = DatasetNode::new(Mnist::open(&options.data, Split::Test)?);
    graph.add("digits", learn.shuffle(true).batch_size(options.batch_size), "train")?.add(
        "digits",
        test.batch_size(500),
        "val",
    )?;

    let kind = if options.double { Kind::Double } else { Kind::Float };
    let build = move |path: &nn::Path| {
        let net = ResNet::new(path);
        if kind == Kind::Double {
            path.clone().double();
        }
        net
    };
    let net = ModuleNode::new(build, move |net, x| {
        Ok(net.forward(&x.get::<Labelled>("digits")?.images.to_kind(kind), x.is_training()))
    });
    let net = net.sync_batch_norm(options.sync_batch_norm).optimizer(Sgd::new(options.lr).momentum(0.9));
    graph.add("net", net, "*")?;

    // tch's cross_entropy_for_logits always computes with 32 bits.
    let loss = LossNode::new(|x| {
        let labels = &x.get::<Labelled>("digits")?.labels;
        Ok(x.tensor("net")?.cross_entropy_loss::<Tensor>(labels, None, Reduction::Mean, -100, 0.0))
    });
    graph.add("loss", loss, "*")?;
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
