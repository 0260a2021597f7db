//! Trains a small GPT to write like a given text, byte by byte.
//!
//!     scripts/fetch-text
//!     cargo run --release --example gpt -- --devices cpu:0-1

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ice::prelude::*;

/// Tokens are bytes.
const VOCABULARY: i64 = 256;

#[derive(Parser)]
#[command(about = "Trains a GPT on the bytes of a text")]
struct Options {
    /// The text; its last tenth is kept for validation.
    #[arg(long, value_name = "FILE", default_value = ".deps/text/kjv.txt")]
    text: PathBuf,
    /// Steps of the optimizer.
    #[arg(long, default_value_t = 600)]
    steps: u64,
    /// Steps between two evaluations on the validation text, each with a checkpoint.
    #[arg(long, default_value_t = 200)]
    eval_every: u64,
    /// Windows of text per rank and pass.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Passes whose gradients make one step.
    #[arg(long, default_value_t = NonZeroU64::MIN)]
    accumulate: NonZeroU64,
    /// Bytes that the model sees.
    #[arg(long, default_value_t = 64)]
    context: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 4)]
    heads: i64,
    #[arg(long, default_value_t = 128)]
    width: i64,
    /// The highest learning rate of AdamW.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Runs forward passes in bfloat16.
    #[arg(long)]
    bf16: bool,
    /// Bytes to write at the end.
    #[arg(long, default_value_t = 300)]
    write: usize,
    #[command(flatten)]
    run: RunOptions,
}

/// A transformer block: attention to the earlier bytes, then a small network. The output of each is
/// added to its input.
struct Block {
    norm1: nn::LayerNorm,
    attention: nn::Linear,
    project: nn::Linear,
    norm2: nn::LayerNorm,
    expand: nn::Linear,
    contract: nn::Linear,
    heads: i64,
}

impl Block {
    fn new(path: &nn::Path, options: &Options) -> Self {
        let width = options.width;
        // The outputs of the branches of all layers add up, so that each begins with smaller
        // weights, as in GPT-2.
        let branch = 0.02 / (2.0 * options.layers as f64).sqrt();
        Self {
            norm1: nn::LayerNorm::new(path / "norm1", width),
            attention: linear(path / "attention", width, 3 * width, 0.02),
            project: linear(path / "project", width, width, branch),
            norm2: nn::LayerNorm::new(path / "norm2", width),
            expand: linear(path / "expand", width, 4 * width, 0.02),
            contract: linear(path / "contract", 4 * width, width, branch),
            heads: options.heads,
        }
    }

    /// Maps `[n, t, width]` to the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        let (n, t, width) = x.size3().unwrap_or_default();
        let parts = x.apply(&self.norm1).apply(&self.attention).chunk(3, -1);
        let by_head = |part: &Tensor| part.view([n, t, self.heads, width / self.heads]).transpose(1, 2);
        let (query, key, value) = (by_head(&parts[0]), by_head(&parts[1]), by_head(&parts[2]));
        let seen = Tensor::scaled_dot_product_attention(
            &query,
            &key,
            &value,
            None::<Tensor>,
            0.0,
            true,
            None,
            false,
        );
        let x = x + seen.transpose(1, 2).reshape([n, t, width]).apply(&self.project);
        let inner = x.apply(&self.norm2).apply(&self.expand).gelu("tanh");
        x + inner.apply(&self.contract)
    }
}

struct Gpt {
    tokens: nn::Embedding,
    places: nn::Embedding,
    blocks: Vec<Block>,
    norm: nn::LayerNorm,
    head: nn::Linear,
    context: i64,
}

impl Gpt {
    fn new(path: &nn::Path, options: &Options) -> Self {
        let embedding = |name: &str, count: i64| {
            let embedding = nn::Embedding::new(path / name, count, options.width);
            nn::init::normal_(&embedding.ws, 0.0, 0.02);
            embedding
        };
        let blocks = path / "blocks";
        Self {
            tokens: embedding("tokens", VOCABULARY),
            places: embedding("places", options.context as i64),
            blocks: (0..options.layers).map(|layer| Block::new(&(&blocks / layer), options)).collect(),
            norm: nn::LayerNorm::new(path / "norm", options.width),
            head: linear(path / "head", options.width, VOCABULARY, 0.02),
            context: options.context as i64,
        }
    }

    /// Maps bytes `[n, t]` to the logits of the byte after each, `[n, t, 256]`.
    fn forward(&self, bytes: &Tensor) -> Tensor {
        let places = Tensor::arange(bytes.size()[1], (Kind::Int64, bytes.device()));
        let x = bytes.apply(&self.tokens) + places.apply(&self.places);
        self.blocks.iter().fold(x, |x, block| block.forward(&x)).apply(&self.norm).apply(&self.head)
    }

    /// Returns the text `start` with `count` more bytes, drawn one by one.
    fn write(&self, start: &str, count: usize, device: ice::tch::Device) -> String {
        let start: Vec<i64> = start.bytes().map(i64::from).collect();
        let mut text = Tensor::from_slice(&start).unsqueeze(0).to_device(device);
        ice::tch::no_grad(|| {
            for _ in 0..count {
                let (_, length) = text.size2().unwrap_or_default();
                let seen = self.context.min(length);
                let logits = self.forward(&text.narrow(1, length - seen, seen)).get(0).get(seen - 1);
                let next = (logits / 0.8).softmax(-1, Kind::Float).multinomial(1, true);
                text = Tensor::cat(&[&text, &next.unsqueeze(0)], 1);
            }
        });
        let bytes: Vec<i64> = Vec::try_from(text.flatten(0, -1)).unwrap_or_default();
        String::from_utf8_lossy(&bytes.iter().map(|byte| *byte as u8).collect::<Vec<_>>()).into_owned()
    }
}

/// Makes a linear layer with GPT-2's initial values: normal weights of deviation `std`, and zeros
/// as biases.
fn linear(path: nn::Path, inputs: i64, outputs: i64, std: f64) -> nn::Linear {
    let layer = nn::Linear::new(path, inputs, outputs);
    nn::init::normal_(&layer.ws, 0.0, std);
    layer.bs.iter().for_each(nn::init::zeros_);
    layer
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| train(options))
}

/// Returns the windows of `text[from..to]`. Each is int64 `[context + 1]`: the bytes that the model
/// sees, and one more.
fn windows(
    text: &Arc<Vec<u8>>,
    from: usize,
    to: usize,
    context: usize,
) -> impl Dataset<Batch = Tensor> + 'static {
    let text = Arc::clone(text);
    items((to - from).saturating_sub(1) / context, move |index| {
        let window = &text[from + index * context..][..context + 1];
        Ok(Tensor::from_slice(window).to_kind(Kind::Int64))
    })
    .stack()
}

fn train(options: Options) -> Result<(), ice::Error> {
    let text = std::fs::read(&options.text).map_err(|error| {
        ice::core::Error::Usage(format!(
            "--text {}: {error}; scripts/fetch-text fetches the default one",
            options.text.display()
        ))
    })?;
    let (text, learned) = (Arc::new(text), options.context);
    let border = text.len() / 10 * 9;
    let mut graph = HyperGraph::new();
    graph.accumulate_gradients(options.accumulate).backup_source_files(env!("CARGO_MANIFEST_DIR"));
    // ANCHOR: precision
    if options.bf16 {
        graph.autocast(Autocast::of(Kind::BFloat16));
    }
    // ANCHOR_END: precision
    let (start, end) = (windows(&text, 0, border, learned), windows(&text, border, text.len(), learned));
    graph.add("text", DatasetNode::new(start).shuffle(true).batch_size(options.batch_size), "train")?;
    graph.add("text", DatasetNode::new(end).batch_size(64), "val")?;

    let (run, write, steps, every) =
        (options.run.clone(), options.write, options.steps, options.eval_every.max(1));
    // ANCHOR: optimizer
    // Weights of norms, biases and embeddings are not drawn to zero.
    let optimizer = |decay: f64| {
        let warm = steps.min(100) / 2;
        let schedule = Schedule::linear_warmup(warm).then(warm, Schedule::cosine(steps - warm, 0.1));
        AdamW::new(options.lr).betas(0.9, 0.95).weight_decay(decay).schedule(schedule)
    };
    let (plain, decayed) = (optimizer(0.0), optimizer(0.1));
    // ANCHOR_END: optimizer
    let context = options.context as i64;
    // ANCHOR: module
    let gpt = ModuleNode::new(
        move |path| Gpt::new(path, &options),
        move |gpt: &Gpt, x| Ok(gpt.forward(&x.tensor("text")?.narrow(1, 0, context))),
    );
    let gpt = gpt.optimizer_for(r"norm|bias$|tokens|places", plain).optimizer(decayed).clip_grad_norm(1.0);
    graph.add("gpt", gpt, "*")?;
    // ANCHOR_END: module

    let loss = LossNode::new(move |x| {
        let next = x.tensor("text")?.narrow(1, 1, context).reshape([-1]);
        Ok(x.tensor("gpt")?.reshape([-1, VOCABULARY]).cross_entropy_for_logits(&next))
    });
    graph.add("loss", loss, "*")?;

    let part = |steps: u64| {
        Repeat::once()
            .then(Task::train("train").steps(steps))
            .then(Task::eval("val"))
            .then(SaveCheckpoint::new())
    };
    let parts = (0..steps.div_ceil(every)).map(|number| part(every.min(steps - number * every)));
    let tasks = parts.fold(Repeat::once(), Repeat::then).call(move |run| {
        if run.is_main() {
            println!("validation loss {:.4}", run.measure("*/loss")?);
            let device = run.worker().device();
            let gpt = run.graph().node::<ModuleNode<Gpt, Tensor>>("gpt")?;
            println!("{}", gpt.module()?.write("And", write, device));
        }
        Ok(())
    });
    graph.run(tasks, &run)
}
