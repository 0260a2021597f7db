//! Trains a small residual network to tell images apart, stops when it gets no better, and uses it.
//! A folder has the images, in `train/<class>/` and `val/<class>/`. Copy this file for a program of
//! your own.
//!
//!     cargo run --release --example images -- --images FOLDER --devices cpu:0-1

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ice::core::data::readers::{ImageFolder, read_image};
use ice::core::{Node, Result};
use ice::prelude::*;

#[derive(Parser)]
#[command(about = "Trains a residual network on a folder of images")]
struct Options {
    /// Folder with `train` and `val`, which have a folder for each class.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Largest number of times to go through the training images.
    #[arg(long, default_value_t = 30)]
    epochs: u64,
    /// Images per rank and step.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Learning rate of AdamW.
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Stop after this many epochs in a row without a better accuracy.
    #[arg(long, default_value_t = 5)]
    patience: u64,
    /// Measure what this run, or checkpoint, has trained.
    #[arg(long, value_name = "PATH")]
    evaluate: Option<PathBuf>,
    /// Name the class of `--image` with what this run, or checkpoint, has trained.
    #[arg(long, value_name = "PATH", requires = "image")]
    predict: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    #[command(flatten)]
    run: RunOptions,
}

/// Two convolutions, and a connection around them (He et al., 2015).
struct BasicBlock {
    conv1: nn::Conv2d,
    bn1: nn::BatchNorm2d,
    conv2: nn::Conv2d,
    bn2: nn::BatchNorm2d,
    downsample: Option<(nn::Conv2d, nn::BatchNorm2d)>,
}

impl BasicBlock {
    fn new(path: &nn::Path, channels: i64, features: i64, stride: i64) -> Self {
        let conv = |path: nn::Path, channels, size, stride| {
            let options = nn::Conv2d::options(channels, features, size).stride(stride);
            options.padding(size / 2).bias(false).build(path)
        };
        let norm = |path: nn::Path| nn::BatchNorm2d::new(path, features);
        let around = path / "downsample";
        Self {
            conv1: conv(path / "conv1", channels, 3, stride),
            bn1: norm(path / "bn1"),
            conv2: conv(path / "conv2", features, 3, 1),
            bn2: norm(path / "bn2"),
            downsample: (channels != features || stride != 1)
                .then(|| (conv(&around / 0, channels, 1, stride), norm(&around / 1))),
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
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
    fn new(path: &nn::Path, classes: i64) -> Self {
        let block = |name: &str, channels, features, stride| {
            BasicBlock::new(&(path / name / 0), channels, features, stride)
        };
        Self {
            conv1: nn::Conv2d::options(3, 16, 3).padding(1).bias(false).build(path / "conv1"),
            bn1: nn::BatchNorm2d::new(path / "bn1", 16),
            layers: [block("layer1", 16, 16, 1), block("layer2", 16, 32, 2), block("layer3", 32, 64, 2)],
            fc: nn::Linear::new(path / "fc", 64, classes),
        }
    }

    /// Maps images `[n, 3, height, width]` to logits `[n, classes]`.
    fn forward(&self, images: &Tensor, train: bool) -> Tensor {
        let x = images.apply(&self.conv1).apply_t(&self.bn1, train).relu();
        let x = self.layers.iter().fold(x, |x, layer| layer.forward(&x, train));
        x.adaptive_avg_pool2d([1, 1]).flatten(1, -1).apply(&self.fc)
    }
}

/// Height and width to which images are scaled.
const SIZE: u32 = 32;

/// Makes numbers from 0 to 1 of pixels.
fn scaled(image: &Tensor) -> Tensor {
    image.to_kind(Kind::Float) / 255.0
}

/// Images, float `[n, 3, SIZE, SIZE]`, and classes. Mirrors half of them if `mirror` is set. Takes
/// the folder by value: in edition 2024, an `impl Dataset` borrows what its function borrows.
fn images(folder: PathBuf, mirror: bool) -> Result<impl Dataset<Batch = Labelled>> {
    let images = ImageFolder::open(folder)?.resize(SIZE, SIZE);
    let images = images.map_random(move |(image, class), rng| {
        let image = scaled(&image);
        Ok((if mirror && rng.chance(0.5) { image.flip([2]) } else { image }, class))
    });
    Ok(images.collate(Labelled::collate))
}

fn classes(options: &Options) -> Result<Vec<String>> {
    Ok(ImageFolder::open(options.images.join("train"))?.classes().to_vec())
}

fn net(classes: usize) -> ModuleNode<ResNet, Tensor> {
    ModuleNode::new(
        move |path| ResNet::new(path, classes as i64),
        |net, x| Ok(net.forward(&x.get::<Labelled>("images")?.images, x.is_training())),
    )
}

fn validation(folder: PathBuf) -> Result<(impl Node, impl Node)> {
    let images = DatasetNode::new(images(folder, false)?).batch_size(64);
    let accuracy = MetricNode::accuracy(1, |x| {
        Ok((x.tensor("net")?, x.get::<Labelled>("images")?.labels.shallow_clone()))
    });
    Ok((images, accuracy))
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| match (&options.evaluate, &options.predict, &options.image) {
        (Some(trained), ..) => evaluate(&options, trained),
        (_, Some(trained), Some(image)) => predict(&options, trained, image),
        _ => train(&options),
    })
}

fn train(options: &Options) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    graph.hparam("lr", options.lr).hparam("batch_size", options.batch_size);
    let learn = DatasetNode::new(images(options.images.join("train"), true)?);
    let learn = learn.shuffle(true).batch_size(options.batch_size).workers(2);
    let (test, accuracy) = validation(options.images.join("val"))?;
    graph.add("images", learn, "train")?.add("images", test, "val")?.add("accuracy", accuracy, "val")?;

    let net = net(classes(options)?.len());
    graph.add("net", net.optimizer(AdamW::new(options.lr)), "*")?;
    let loss = LossNode::new(|x| {
        Ok(x.tensor("net")?.cross_entropy_for_logits(&x.get::<Labelled>("images")?.labels))
    });
    graph.add("loss", loss, "*")?;

    let epochs = Repeat::new(options.epochs)
        .then(Task::train("train"))
        .then(Task::eval("val"))
        .then(SaveBest::new("val/accuracy", Better::Higher))
        .then(SaveCheckpoint::new())
        .then(EarlyStop::new("val/accuracy", Better::Higher).patience(options.patience));
    graph.run(epochs, &options.run)
}

// ANCHOR: evaluate
fn evaluate(options: &Options, trained: &Path) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    let (images, accuracy) = validation(options.images.join("val"))?;
    graph.add("images", images, "val")?.add("accuracy", accuracy, "val")?;
    graph.add("net", net(classes(options)?.len()), "*")?;

    let eager = graph.eager(Device::Cpu, 0)?;
    eager.load(trained)?;
    println!("accuracy {:.4}", eager.evaluate("val")?["val/accuracy"]);
    Ok(())
}
// ANCHOR_END: evaluate

// ANCHOR: predict
fn predict(options: &Options, trained: &Path, image: &Path) -> Result<(), ice::Error> {
    let classes = classes(options)?;
    let mut graph = HyperGraph::new();
    graph.add("net", net(classes.len()), "*")?;

    let eager = graph.eager(Device::Cpu, 0)?;
    eager.load(trained)?;
    let images = scaled(&read_image(image, Some((SIZE, SIZE)))?).unsqueeze(0);
    // The network asks for a `Labelled`. Nothing reads its labels.
    eager.set_input("images", Labelled { images, labels: Tensor::from_slice(&[0_i64]) });
    let likelihood = eager.forward("*", |x| Ok(x.tensor("net")?.softmax(1, Kind::Float)))?;
    let class = likelihood.argmax(1, false).int64_value(&[0]);
    println!("{} {:.3}", classes[class as usize], likelihood.max().double_value(&[]));
    Ok(())
}
// ANCHOR_END: predict
