//! Trains a network of a given size until it is stopped. The benchmark of recoveries kills ranks of
//! this program. `tests/python/ddp_steps.py` is the same program for PyTorch.

use std::process::ExitCode;

use ice::core::Result;
use ice::prelude::*;
use tch::Device;

#[derive(Parser)]
struct Options {
    /// Parameters and the state of their optimizer, in MB.
    #[arg(long)]
    megabytes: f64,
    #[command(flatten)]
    run: RunOptions,
}

const WIDTH: i64 = 512;

struct Ones;

impl Dataset for Ones {
    type Batch = Tensor;

    fn len(&self) -> usize {
        1 << 24
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        Ok(Tensor::ones([indices.len() as i64, WIDTH], (Kind::Float, device)))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| train(&options))
}

fn train(options: &Options) -> Result<(), ice::Error> {
    // Parameters have four bytes, and AdamW keeps twice as much state.
    let layers = (options.megabytes * 1e6 / (12 * WIDTH * WIDTH) as f64).max(1.0) as usize;
    let mut graph = HyperGraph::new();
    graph.add("ones", DatasetNode::new(Ones).batch_size(16), "*")?;
    let net = ModuleNode::new(
        move |path: &nn::Path| {
            let layer = |n: usize| nn::linear(path / n, WIDTH, WIDTH, Default::default());
            (0..layers).map(layer).collect::<Vec<_>>()
        },
        |layers, x| Ok(layers.iter().fold(x.tensor("ones")?, |x, layer| x.apply(layer))),
    );
    graph.add("net", net.optimizer(AdamW::new(1e-4)), "*")?;
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "*")?;
    graph.run(Task::train("*").steps(u64::MAX), &options.run)
}
