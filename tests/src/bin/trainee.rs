//! A training with all kinds of state that a checkpoint has to hold, for tests that kill it:
//! shuffled data from worker threads, dropout, batch statistics, several optimizers, schedules,
//! meters, tasks of every kind.
//!
//! Each rank appends the samples that it has trained on to `rank<N>.txt` in the folder `--seen`,
//! one line per pass: the number of this process in the life of the training (`--life`), the number
//! of the pass, and the indices. Rank 0 prints `pass <number>`.

use std::cell::Cell;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use ice::core::{Context, Error, Node, NodeState, Result, Round, Value};
use ice::prelude::*;
use tch::Device;

#[derive(Parser)]
struct Options {
    #[arg(long)]
    seen: PathBuf,
    #[arg(long)]
    life: u64,
    #[arg(long)]
    shard_optimizer: bool,
    /// Samples of a batch for each rank, instead of 8 for all of them.
    #[arg(long)]
    per_rank: Option<usize>,
    /// How often the tasks are done.
    #[arg(long, default_value_t = 6)]
    repeats: u64,
    /// Ends the run when a closure has been called this many times, which a rank that is started
    /// again counts from 0.
    #[arg(long)]
    end_after: Option<u64>,
    /// This rank dies in the second call of that closure in the last run, unless it was started
    /// again.
    #[arg(long)]
    dies: Option<usize>,
    /// Kills that rank within this node instead. In the sixth step, `seen` runs before the forward
    /// pass of the module, `loss` after it. `noise` runs in the second iteration of an evaluation.
    #[arg(long, requires = "dies")]
    dies_in: Option<String>,
    /// Computes the statistics of batch normalization over all ranks.
    #[arg(long)]
    sync_batch_norm: bool,
    /// Trains this TorchScript module, whose input has four features, instead.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Runs of the program, one after the other. Those after the first write to
    /// `rank<N>.run<M>.txt`.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// Saves the nodes of validation in this folder at the end of a run.
    #[arg(long)]
    tagged: Option<PathBuf>,
    /// Loads this checkpoint at the end of a run.
    #[arg(long)]
    loads: Option<PathBuf>,
    #[command(flatten)]
    run: RunOptions,
}

/// Number of samples that fills no last batch and cannot be divided evenly.
const SAMPLES: usize = 46;

const TWO: NonZeroU64 = NonZeroU64::MIN.saturating_add(1);
const FIVE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4);

/// Points of a curve: their indices, and f32 `[n, 4]`.
struct Curve;

impl Dataset for Curve {
    type Batch = (Tensor, Tensor);

    fn len(&self) -> usize {
        SAMPLES
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch> {
        let indices = Tensor::from_slice(indices);
        let rates = Tensor::from_slice(&[0.1, 0.23, 0.37, 0.51]);
        let points = (indices.unsqueeze(1).to_kind(Kind::Double) * rates).sin().to_kind(Kind::Float);
        Ok((indices.to_device(device), points.to_device(device)))
    }
}

/// Rank that is killed within a node, and the name of the node.
#[derive(Clone)]
struct Death(Option<(usize, String)>);

impl Death {
    fn check(&self, node: &str, x: &Outputs) {
        let Some((rank, place)) = &self.0 else { return };
        // The variables of the process, whichever rank it becomes later.
        let is = |name: &str, value: usize| env::var(name).is_ok_and(|text| text == value.to_string());
        let is_due =
            if x.is_training() { x.train_steps() == 5 } else { place == "noise" && x.iteration() == 1 };
        if place == node && is_due && is("RANK", *rank) && is("TORCHELASTIC_RESTART_COUNT", 0) {
            process::abort();
        }
    }
}

/// Records the samples that were trained on, and counts passes across kills.
struct Seen {
    death: Death,
    folder: PathBuf,
    /// Suffix after the number of the rank in the name of a file.
    suffix: String,
    life: u64,
    out: Option<(File, bool)>,
    passes: u64,
    /// Value of `passes` at the start of the step, to which a repeated step returns.
    mark: u64,
    indices: Vec<i64>,
}

impl Seen {
    fn new(folder: &Path, life: u64, run: u64, death: Death) -> Self {
        let suffix = if run == 1 { String::new() } else { format!(".run{run}") };
        let folder = folder.to_owned();
        Self { death, folder, suffix, life, out: None, passes: 0, mark: 0, indices: Vec::new() }
    }
}

impl Node for Seen {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn enter_round(&mut self, round: &Round) -> Result<()> {
        let path = self.folder.join(format!("rank{}{}.txt", round.worker.rank(), self.suffix));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|source| Error::Io { path, source })?;
        self.out = Some((file, round.worker.is_main()));
        if round.worker.is_main() {
            println!("world size {}", round.worker.world_size());
        }
        Ok(())
    }

    fn before_step(&mut self) -> Result<()> {
        self.mark = self.passes;
        Ok(())
    }

    fn roll_back(&mut self) {
        self.passes = self.mark;
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let (indices, _) = &*x.get::<(Tensor, Tensor)>("curve")?;
        self.indices = Vec::try_from(indices)?;
        self.death.check("seen", x);
        Ok(Value::new(()))
    }

    fn iteration_end(&mut self) {
        self.passes += 1;
        let Some((file, is_main)) = &mut self.out else { return };
        let line = format!("{} {} {:?}\n", self.life, self.passes, self.indices);
        file.write_all(line.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        if *is_main {
            println!("pass {}", self.passes);
        }
    }

    fn state(&self) -> NodeState {
        NodeState { values: self.passes.into(), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.passes = saved.values.as_u64().unwrap_or(0);
        Ok(())
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| (1..=options.runs).try_for_each(|run| train(&options, run)))
}

fn train(options: &Options, run: u64) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    graph.accumulate_gradients(TWO);
    let curve = DatasetNode::new(Curve).shuffle(true).workers(2);
    let curve = match options.per_rank {
        Some(samples) => curve.batch_size(samples),
        None => curve.global_batch_size(8),
    };
    graph.add("curve", curve, "train")?;
    graph.add("curve", DatasetNode::new(Curve).global_batch_size(10), "val")?;
    let death = Death(options.dies.zip(options.dies_in.clone()));
    graph.add("seen", Seen::new(&options.seen, options.life, run, death.clone()), "train")?;
    let points = |x: &Outputs| -> Result<Tensor> {
        let (_, points) = &*x.get::<(Tensor, Tensor)>("curve")?;
        Ok(points.shallow_clone())
    };
    match &options.script {
        Some(file) => {
            let net = ModuleNode::torch_script(file, move |net, x| net.forward(x, &[points(x)?]));
            graph.add("net", trained(net, options), "*")?;
        }
        None => {
            let net = ModuleNode::new(
                |path: &nn::Path| {
                    let first = nn::linear(path / "first", 4, 32, Default::default());
                    let norm = nn::batch_norm1d(path / "norm", 32, Default::default());
                    (first, norm, nn::linear(path / "last", 32, 4, Default::default()))
                },
                move |(first, norm, last), x| {
                    let hidden = points(x)?.apply(first).apply_t(norm, x.is_training()).tanh();
                    Ok(hidden.dropout(0.2, x.is_training()).apply(last))
                },
            );
            graph.add("net", trained(net, options), "*")?;
        }
    }
    let error = move |x: &Outputs| -> Result<Tensor> {
        let net = x.tensor("net")?;
        let points = points(x)?.narrow(1, 0, net.size()[1]);
        Ok((net - points).square())
    };
    let dies = death.clone();
    let loss = LossNode::new(move |x| {
        let loss = error(x)?.mean(Kind::Float);
        dies.check("loss", x);
        Ok(loss)
    });
    graph.add("loss", loss, "*")?;
    graph.add("error", MetricNode::average(move |x| Ok(error(x)?.mean_dim(1, false, Kind::Float))), "*")?;
    let moving = MetricNode::moving_average(FIVE, move |x| Ok(error(x)?.mean_dim(1, false, Kind::Float)));
    graph.add("moving", moving, "train")?;
    let noise = MetricNode::average(move |x| {
        death.check("noise", x);
        Ok(error(x)?.mean_dim(1, false, Kind::Float).rand_like())
    });
    graph.add("noise", noise, "val")?;

    let inner = Repeat::new(2).then(Task::train("train").steps(3)).then(Task::eval("val"));
    let outer = Repeat::new(options.repeats)
        .then(Task::train("train"))
        .then(Task::eval("val"))
        .then(SaveCheckpoint::new())
        .then(inner)
        .then(ReduceLROnPlateau::new("*/error", Better::Lower).patience(0).rel_threshold(0.3).factor(0.9))
        .then(SaveBest::new("*/error", Better::Lower).max_keep(2))
        .call(end(
            options.end_after,
            options.dies.filter(|_| run == options.runs && options.dies_in.is_none()),
        ));
    let last = Task::train("train").steps(7).simulate_epoch();
    let tasks = Repeat::once().then(outer).then(last).then(SaveCheckpoint::new());
    let tasks = match &options.tagged {
        Some(folder) => tasks.then(SaveCheckpoint::new().to(folder).tags("val")),
        None => tasks,
    };
    let tasks = match &options.loads {
        Some(folder) => tasks.then(LoadCheckpoint::from(folder)),
        None => tasks,
    };
    let tasks = tasks.call(move |state| {
        if state.is_main() {
            println!("run {run} is at its end");
        }
        Ok(())
    });
    graph.run(tasks, &options.run)
}

/// Adds the optimizers to the module.
fn trained<M: 'static>(net: ModuleNode<M, Tensor>, options: &Options) -> ModuleNode<M, Tensor> {
    net.optimizer_for(
        "first",
        AdamW::new(0.02)
            .schedule(Schedule::cosine(60, 0.1))
            .value_of(Field::Beta1, Schedule::linear(0.85, 0.95, 60)),
    )
    .optimizer_for("norm", RmsProp::new(0.01).schedule(Schedule::exponential(0.9).by_epoch()))
    .optimizer(Sgd::new(0.05).momentum(0.9).schedule(Schedule::step(9, 0.8)))
    .clip_grad_norm(1.0)
    .shard_optimizer(options.shard_optimizer)
    .sync_batch_norm(options.sync_batch_norm)
}

/// Returns a closure that counts its calls by itself, so that restarted ranks disagree with the
/// others.
fn end(after: Option<u64>, dies: Option<usize>) -> impl Fn(&Run) -> Result<()> {
    let calls = Cell::new(0);
    move |run| {
        calls.set(calls.get() + 1);
        let worker = run.worker();
        if calls.get() == 2 && dies == Some(worker.rank()) && worker.restart_count() == 0 {
            process::abort();
        }
        if after == Some(calls.get()) { Err(Error::StopAllTasks) } else { Ok(()) }
    }
}
