//! Training steps: accumulated, in mixed precision, skipped, on one or more ranks.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::{Cell, RefCell};
use std::num::NonZeroU64;
use std::rc::Rc;

use common::{Line, as_ranks, on_ranks};
use ice_core::optim::{Optimizer, Schedule, Sgd};
use ice_core::{
    Autocast, Context, DatasetNode, GradScaler, HyperGraph, LossNode, MetricNode, ModuleNode, Node, Outputs,
    Repeat, Result, Run, RunConfig, Task, Value,
};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

type Function = Box<dyn Fn(&Outputs) -> ice_core::Result<Tensor>>;

/// Observations of a rank.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    /// Parameters at the end.
    parameters: Vec<f64>,
    /// Types of the module's outputs.
    kinds: Vec<Kind>,
}

#[derive(Clone)]
struct Options {
    samples: usize,
    batch: usize,
    passes: u64,
    steps: u64,
    autocast: Option<Autocast>,
    scaler: Option<fn() -> GradScaler>,
    /// Rank and step, from 0, with an infinite loss.
    infinite: Option<(usize, u64)>,
    schedule: fn() -> Schedule,
    /// Whether the loss runs backward itself.
    by_itself: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            samples: 24,
            batch: 4,
            passes: 1,
            steps: 1,
            autocast: None,
            scaler: None,
            infinite: None,
            schedule: Schedule::constant,
            by_itself: false,
        }
    }
}

impl Options {
    fn graph(&self, rank: usize) -> (HyperGraph, Repeat, Box<dyn Fn() -> Seen>) {
        let mut graph = HyperGraph::new();
        if let Some(autocast) = self.autocast {
            graph.autocast(autocast);
        }
        if let Some(scaler) = self.scaler {
            graph.grad_scaler(scaler()).unwrap();
        }
        graph.accumulate_gradients(NonZeroU64::new(self.passes).unwrap());
        graph.add("x", DatasetNode::new(Line(self.samples)).batch_size(self.batch), "*").unwrap();
        let seen = Rc::new(RefCell::new(Seen::default()));
        let see = Rc::clone(&seen);
        let net = ModuleNode::new(linear, move |net: &nn::Linear, x| {
            let output = x.tensor("x")?.apply(net);
            let mut seen = see.borrow_mut();
            seen.kinds.push(output.kind());
            let values = Tensor::cat(&[net.ws.flatten(0, -1), net.bs.as_ref().unwrap().shallow_clone()], 0);
            seen.parameters = Vec::try_from(values.to_kind(Kind::Double)).unwrap();
            Ok(output)
        });
        let optimizer = Sgd::new(0.5).momentum(0.5).schedule((self.schedule)());
        graph.add("net", net.optimizer(optimizer), "*").unwrap();
        let (infinite, step) = (self.infinite, Cell::new(0));
        let by_itself = self.by_itself;
        let loss: Function = Box::new(move |x| {
            let mut loss = x.tensor("net")?.to_kind(Kind::Float).square().mean(Kind::Float);
            if x.is_training() {
                if infinite == Some((rank, step.get())) {
                    loss *= f64::INFINITY;
                }
                step.set(step.get() + 1);
                if by_itself {
                    loss.f_backward()?;
                }
            }
            Ok(loss)
        });
        let loss = if by_itself { LossNode::with_backward(loss) } else { LossNode::new(loss) };
        graph.add("loss", loss, "*").unwrap();
        // The evaluation observes the parameters after the training.
        let tasks =
            Repeat::once().then(Task::train("train").steps(self.steps)).then(Task::eval("val").steps(1));
        (graph, tasks, Box::new(move || seen.borrow().clone()))
    }

    fn run(&self, ranks: usize) -> Vec<Seen> {
        on_ranks(ranks, |rank| self.graph(rank))
    }
}

/// Creates a layer with fixed parameters: ranks that are threads share a generator, so that random
/// parameters would differ between runs.
fn linear(path: &nn::Path) -> nn::Linear {
    let layer = nn::linear(path / "layer", 1, 3, Default::default());
    let values = Tensor::from_slice(&[0.7_f32, -0.4, 0.2]);
    tch::no_grad(|| {
        layer.ws.shallow_clone().copy_(&values.unsqueeze(1));
        layer.bs.as_ref().unwrap().shallow_clone().copy_(&values);
    });
    layer
}

fn close(a: &Seen, b: &Seen) -> bool {
    a.parameters.iter().zip(&b.parameters).all(|(a, b)| (a - b).abs() < 1e-6)
}

#[test]
fn several_batches_are_one_whatever_their_sizes() {
    // 22 samples: all at once; in batches of 4, the last one of 2; and on ranks in batches of 6 and
    // 9, the last ones uneven.
    let whole = Options { samples: 22, batch: 22, steps: 3, ..Options::default() }.run(1);
    for (ranks, batch, passes) in [(1, 4, 6), (1, 4, 9), (2, 3, 4), (3, 3, 3), (2, 11, 1), (1, 22, 1)] {
        let parts = Options { samples: 22, batch, passes, steps: 3, ..Options::default() }.run(ranks);
        for rank in &parts {
            assert!(close(rank, &whole[0]), "{ranks} ranks, {passes} x {batch}: {rank:?}, {whole:?}");
        }
    }
    // The same holds if the loss runs backward itself.
    for (ranks, batch, passes) in [(1, 22, 1), (1, 4, 6), (2, 3, 4), (3, 3, 3), (2, 11, 1)] {
        let parts = Options { samples: 22, batch, passes, steps: 3, by_itself: true, ..Options::default() };
        for rank in &parts.run(ranks) {
            assert!(
                close(rank, &whole[0]),
                "by itself, {ranks} ranks, {passes} x {batch}: {rank:?}, {whole:?}"
            );
        }
    }
    let other = Options { samples: 22, batch: 4, passes: 5, steps: 3, ..Options::default() }.run(1);
    assert!(!close(&other[0], &whole[0]), "the check sees another step");
}

#[test]
fn forward_passes_run_in_the_smaller_type_of_training_and_evaluation() {
    let kinds = |autocast| Options { autocast, ..Options::default() }.run(1).remove(0).kinds;
    assert_eq!(kinds(None), [Kind::Float; 2]);
    assert_eq!(kinds(Some(Autocast::new())), [Kind::BFloat16; 2]);
    assert_eq!(kinds(Some(Autocast::of(Kind::Half))), [Kind::Half; 2]);
}

#[test]
fn a_scaled_loss_makes_the_same_steps() {
    let plain = Options { steps: 4, ..Options::default() }.run(2);
    let scaled = Options { steps: 4, scaler: Some(GradScaler::new), ..Options::default() }.run(2);
    assert!(close(&plain[0], &scaled[0]) && close(&plain[0], &scaled[1]), "{plain:?}, {scaled:?}");
}

#[test]
fn a_step_that_is_infinite_on_one_rank_is_left_out_on_all() {
    // All batches are the same, so that a skipped step has no effect.
    let options = Options { samples: 8, steps: 3, scaler: Some(GradScaler::new), ..Options::default() };
    let undisturbed = options.run(2);
    let disturbed = Options { steps: 4, infinite: Some((1, 1)), ..options.clone() }.run(2);
    assert_eq!(disturbed[0].parameters, disturbed[1].parameters);
    assert!(close(&disturbed[0], &undisturbed[0]), "{disturbed:?}, {undisturbed:?}");
    // Without a scaler, an infinite loss destroys the parameters.
    let lost = Options { scaler: None, infinite: Some((1, 1)), ..options }.run(2);
    assert!(lost[0].parameters.iter().all(|value| !value.is_finite()), "{lost:?}");
}

#[test]
fn the_scale_follows_what_is_found_and_a_step_left_out_does_not_move_the_schedule() {
    let options = Options {
        samples: 4,
        steps: 4,
        schedule: || Schedule::step(2, 0.1),
        scaler: Some(|| GradScaler::new().init_scale(8.0).growth_interval(2)),
        ..Options::default()
    };
    let undisturbed = Options { steps: 3, ..options.clone() }.run(1);
    let disturbed = Options { infinite: Some((0, 0)), ..options }.run(1);
    assert!(close(&disturbed[0], &undisturbed[0]), "{disturbed:?}, {undisturbed:?}");
}

#[test]
fn buffers_are_rank_0s_in_the_next_step() {
    let spread = |broadcast: bool| {
        let statistics: Vec<f64> = on_ranks(2, move |rank| {
            let mut graph = HyperGraph::new();
            graph.add("x", DatasetNode::new(Line(16)).batch_size(4), "*").unwrap();
            let seen = Rc::new(Cell::new(0.0));
            let see = Rc::clone(&seen);
            let net = ModuleNode::new(
                |path| nn::batch_norm1d(path / "norm", 1, Default::default()),
                move |norm: &nn::BatchNorm, x| {
                    see.set(norm.running_mean.double_value(&[0]));
                    // Each rank has different data.
                    Ok((x.tensor("x")? + rank as f64).apply_t(norm, x.is_training()))
                },
            );
            graph.add("net", net.optimizer(Sgd::new(0.1)).broadcast_buffers(broadcast), "*").unwrap();
            graph
                .add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "*")
                .unwrap();
            (
                graph,
                Repeat::once().then(Task::train("train").steps(2)),
                Box::new(move || seen.get()) as Box<_>,
            )
        });
        (statistics[0] - statistics[1]).abs()
    };
    assert!(spread(true) == 0.0 && spread(false) > 0.05);
}

#[test]
fn gradients_that_are_not_finite_are_not_applied_and_their_rank_is_named() {
    let out = tempfile::tempdir().unwrap();
    let errors = as_ranks(3, |worker| {
        let rank = worker.rank();
        let mut graph = HyperGraph::new();
        graph.add("line", DatasetNode::new(Line(12)).batch_size(2), "*").unwrap();
        let net = ModuleNode::new(
            |path| nn::linear(path / "layer", 1, 1, nn::LinearConfig::default()),
            |net, x| Ok(x.tensor("line")?.apply(net)),
        );
        graph.add("net", net.optimizer(Sgd::new(0.5)), "*").unwrap();
        let loss = LossNode::new(move |x| {
            let factor = if rank == 1 { f64::NAN } else { 1.0 };
            Ok(x.tensor("net")?.square().mean(Kind::Float) * factor)
        });
        graph.add("loss", loss, "*").unwrap();
        let config = RunConfig { out_dir: out.path().to_owned(), check_finite: true, ..RunConfig::default() };
        let outcome = Run::execute(&graph, &Task::train("*"), Rc::new(worker), config);
        let finite = {
            let node = graph.node::<ModuleNode<nn::Linear, Tensor>>("net").unwrap();
            node.module().unwrap().ws.double_value(&[0, 0]).is_finite()
        };
        (outcome.unwrap_err().to_string(), finite)
    });
    for (rank, (error, finite)) in errors.iter().enumerate() {
        assert!(*finite, "{error}");
        assert!(error.contains("of rank 1 in step 1"), "{error}");
        assert_eq!(error.contains("here, on rank 1, those of `*/net`"), rank == 1, "{error}");
    }
}

/// Counts the collectives of each training step.
#[derive(Default)]
struct Collectives {
    worker: Option<Rc<Worker>>,
    of_steps: Rc<RefCell<Vec<u64>>>,
}

impl Node for Collectives {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        self.worker = Some(Rc::clone(&context.worker));
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> Result<Value> {
        Ok(Value::new(()))
    }

    fn step_end(&mut self) -> Result<()> {
        self.of_steps.borrow_mut().extend(self.worker.as_ref().map(|worker| worker.link().collectives()));
        Ok(())
    }
}

/// A layer, and buffers of three types with various strides.
struct WithBuffers {
    layer: nn::Linear,
    buffers: Vec<Tensor>,
}

impl WithBuffers {
    fn new(path: &nn::Path) -> Self {
        // gloo does not support int16. For a column, it would send the elements that follow the
        // column's first one in memory.
        let kinds = [Kind::Int16, Kind::Float, Kind::Int64, Kind::Int16, Kind::Float, Kind::Int64];
        let column = |(place, kind): (usize, &Kind)| {
            let matrix = Tensor::zeros([3, 2], (*kind, path.device()));
            [
                path.add(&format!("column{place}"), matrix.select(1, 1), false),
                path.add(&format!("count{place}"), Tensor::zeros([], (*kind, path.device())), false),
            ]
        };
        Self { layer: linear(path), buffers: kinds.iter().enumerate().flat_map(column).collect() }
    }

    /// Returns the values of the buffers.
    fn values(&self) -> Vec<i64> {
        let rows: Vec<_> =
            self.buffers.iter().map(|buffer| buffer.flatten(0, -1).to_kind(Kind::Int64)).collect();
        Vec::try_from(Tensor::cat(&rows, 0)).unwrap()
    }
}

#[test]
fn buffers_of_any_type_and_strides_are_those_of_rank_0_after_a_step_by_one_broadcast_per_type() {
    let run = |broadcast: bool, shared: bool| {
        on_ranks(2, |rank| {
            let mut graph = HyperGraph::new();
            graph.add("line", DatasetNode::new(Line(4)).batch_size(2), "*").unwrap();
            let seen = Rc::new(RefCell::new(Vec::new()));
            let see = Rc::clone(&seen);
            let forward = move |net: &WithBuffers, x: &Outputs| {
                *see.borrow_mut() = net.values();
                if x.is_training() {
                    for (place, buffer) in net.buffers.iter().enumerate() {
                        let _ = buffer.shallow_clone().g_add_scalar_((10 * rank + place) as i64);
                    }
                }
                let input = if shared { x.tensor("inner")?.narrow(1, 0, 1) } else { x.tensor("line")? };
                Ok(input.apply(&net.layer))
            };
            let net = ModuleNode::new(WithBuffers::new, forward.clone()).broadcast_buffers(broadcast);
            if shared {
                graph.add("net", net.share(forward), "*").unwrap();
                graph.add("owner", net, "other").unwrap();
                let inner = ModuleNode::new(linear, |net, x| Ok(x.tensor("line")?.apply(net)));
                graph.add("inner", inner.optimizer(Sgd::new(0.5)), "*").unwrap();
            } else {
                graph.add("net", net.optimizer(Sgd::new(0.5)), "*").unwrap();
            }
            let collectives = Collectives::default();
            let of_steps = Rc::clone(&collectives.of_steps);
            graph.add("collectives", collectives, "train").unwrap();
            graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.mean(Kind::Float))), "*").unwrap();
            let tasks = Repeat::once().then(Task::train("train").steps(1)).then(Task::eval("val").steps(1));
            let result = move || (seen.take(), of_steps.take());
            (graph, tasks, Box::new(result) as Box<dyn Fn() -> (Vec<i64>, Vec<u64>)>)
        })
    };
    let of_rank_0: Vec<i64> =
        (0..12).flat_map(|place| vec![place; if place % 2 == 0 { 3 } else { 1 }]).collect();
    for shared in [false, true] {
        let (without, with) = (run(false, shared), run(true, shared));
        for rank in 0..2 {
            assert_eq!(with[rank].0, of_rank_0, "rank {rank}");
            assert_eq!(with[rank].1, [without[rank].1[0] + 3], "rank {rank}: {without:?}");
        }
        assert_ne!(without[1].0, of_rank_0);
    }
}

/// Trains on two datasets, `a` and `b`, whose samples are the numbers from 1. `sizes` are the
/// samples of each and the samples per rank and step. The training runs for an epoch of both, with
/// a loss of one. Returns the weight and the measures of loss and metric. The weight starts at 0,
/// and each step subtracts the mean of its samples.
fn two_datasets(
    ranks: usize,
    passes: u64,
    sizes: [(usize, usize); 2],
    samples_of: Option<&'static str>,
    of: &'static [&'static str],
) -> Vec<Result<[f64; 3], String>> {
    let out = tempfile::tempdir().unwrap();
    as_ranks(ranks, |worker| {
        let mut graph = HyperGraph::new();
        graph.accumulate_gradients(NonZeroU64::new(passes).unwrap());
        for (name, (samples, batch)) in ["a", "b"].into_iter().zip(sizes) {
            graph.add(name, DatasetNode::new(Line(samples)).batch_size(batch), "*").unwrap();
        }
        let net = ModuleNode::new(
            |path| path.zeros("w", &[1]),
            move |w, x| {
                let means = of.iter().map(|name| {
                    let scale = sizes[usize::from(*name == "b")].0 as f64;
                    Ok((x.tensor(name)? * scale + 1.0).mean(Kind::Float) * w)
                });
                Ok(means.collect::<ice_core::Result<Vec<Tensor>>>()?.into_iter().sum::<Tensor>())
            },
        );
        graph.add("net", net.optimizer(Sgd::new(1.0)), "*").unwrap();
        let loss = LossNode::new(|x| Ok(x.tensor("net")?.sum(Kind::Float)));
        let last = of[of.len() - 1];
        let scale = sizes[usize::from(last == "b")].0 as f64;
        let metric = MetricNode::average(move |x| Ok(x.tensor(last)?.squeeze_dim(1) * scale + 1.0));
        let loss = match samples_of {
            Some(name) => loss.samples_of(name),
            None => loss,
        };
        graph.add("loss", loss, "*").unwrap().add("metric", metric, "*").unwrap();
        let seen = Rc::new(Cell::new([0.0; 3]));
        let see = Rc::clone(&seen);
        let tasks = Repeat::once().then(Task::train("train")).call(move |run| {
            let node = run.graph().node::<ModuleNode<Tensor, Tensor>>("net")?;
            see.set([node.module()?.double_value(&[0]), run.measure("*/loss")?, run.measure("*/metric")?]);
            Ok(())
        });
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        let outcome = Run::execute(&graph, &tasks, Rc::new(worker), config);
        outcome.map(|()| seen.get()).map_err(|error| error.to_string())
    })
}

#[test]
fn loss_and_metric_weigh_samples_of_the_dataset_they_depend_on() {
    // In the second step, rank 1 has no sample of `a`, and each rank has 4 samples of `b`: 1 to 8,
    // then 9 to 16.
    for outcome in two_datasets(2, 1, [(5, 2), (30, 4)], None, &["b"]) {
        assert_eq!(outcome.unwrap()[..], [-17.0, (0.0 - 4.5 * 12.5) / 2.0, 8.5]);
    }
    for outcome in two_datasets(2, 1, [(5, 2), (30, 4)], None, &["a"]) {
        assert_eq!(outcome.unwrap()[..], [-2.5 - 5.0, (0.0 * 4.0 - 2.5 * 5.0) / 5.0, 3.0]);
    }
}

#[test]
fn accumulated_losses_weigh_each_sample_of_their_dataset_the_same() {
    // Samples of the passes on one rank: 2, 2 and 1 of `a`, and 4, 4 and 4 of `b`. On two ranks: 4
    // and 1, and 8 and 8.
    for (ranks, of, weight) in [(1, &["b"], -6.5), (1, &["a"], -3.0), (2, &["b"], -8.5), (2, &["a"], -3.0)] {
        for outcome in two_datasets(ranks, 3, [(5, 2), (30, 4)], None, of) {
            let found = outcome.unwrap()[0];
            assert!((found - weight).abs() < 1e-5, "{ranks} ranks, {of:?}: {found}");
        }
    }
    // If the loss names a dataset, only that dataset counts.
    let both = &["a", "b"];
    let found = two_datasets(1, 3, [(5, 2), (30, 4)], Some("b"), both)[0].clone().unwrap()[0];
    // The means over the passes of `a`, which are 1.5, 3.5 and 5, are weighted by the samples of
    // `b`.
    assert!((found + 6.5 + 10.0 / 3.0).abs() < 1e-5, "{found}");
}

#[test]
fn loss_over_datasets_that_are_spread_differently_is_refused_by_name_unless_one_is_chosen() {
    let both: &[&str] = &["a", "b"];
    for outcome in two_datasets(2, 1, [(5, 2), (30, 4)], None, both) {
        let problem = outcome.unwrap_err();
        assert!(
            ["`*/a` and `*/b`", "samples_of(\"a\")"].iter().all(|part| problem.contains(part)),
            "{problem}"
        );
    }
    // The datasets are distributed alike, although their sizes differ.
    for outcome in two_datasets(2, 1, [(8, 2), (16, 4)], None, both) {
        assert_eq!(outcome.unwrap()[0], -(2.5 + 4.5) - (6.5 + 12.5));
    }
    // In the second step, only rank 0 has a sample of `a`, the fifth, and it has samples 9 to 12 of
    // `b`.
    for outcome in two_datasets(2, 1, [(5, 2), (30, 4)], Some("a"), both) {
        assert_eq!(outcome.unwrap()[0], -(2.5 + 4.5) - (5.0 + 10.5));
    }
    for outcome in two_datasets(2, 1, [(5, 2), (30, 4)], Some("net"), both) {
        assert!(outcome.unwrap_err().contains("`net` is not a dataset"));
    }
}

#[test]
fn loss_without_a_dataset_weighs_the_same_on_any_number_of_ranks() {
    let outcome = |ranks| {
        on_ranks(ranks, |_| {
            let mut graph = HyperGraph::new();
            let net = ModuleNode::new(|path| path.ones("w", &[1]), |w, _| Ok(w.shallow_clone()));
            graph.add("net", net.optimizer(Sgd::new(0.25)), "*").unwrap();
            let loss = LossNode::new(|x| Ok(x.tensor("net")?.square().sum(Kind::Float)));
            graph.add("loss", loss, "*").unwrap();
            let seen = Rc::new(Cell::new([0.0; 2]));
            let see = Rc::clone(&seen);
            let tasks =
                Repeat::once().then(Task::train("train").steps(2).simulate_epoch()).call(move |run| {
                    let node = run.graph().node::<ModuleNode<Tensor, Tensor>>("net")?;
                    see.set([node.module()?.double_value(&[0]), run.measure("*/loss")?]);
                    Ok(())
                });
            (graph, tasks, Box::new(move || seen.get()) as Box<_>)
        })
    };
    for ranks in [1, 2, 3] {
        assert_eq!(outcome(ranks), vec![[0.25, (1.0 + 0.25) / 2.0]; ranks], "{ranks}");
    }
}

/// Creates a line with a constant slope and height.
fn line(path: &nn::Path) -> nn::Linear {
    let (ws_init, bs_init) = (nn::Init::Const(0.5), Some(nn::Init::Const(0.25)));
    nn::linear(path, 1, 1, nn::LinearConfig { ws_init, bs_init, bias: true })
}

/// Creates two networks that train against each other, and the tasks.
fn adversaries() -> Result<(HyperGraph, Repeat)> {
    let mut graph = HyperGraph::new();
    graph.add("noise", DatasetNode::new(Line(8)).batch_size(8), "*")?;
    graph.add("real", DatasetNode::new(Line(8)).batch_size(8), "critic")?;
    // ANCHOR: gan
    let generator = ModuleNode::new(line, |net: &nn::Linear, x| Ok(x.tensor("noise")?.apply(net)));
    let critic = ModuleNode::new(line, |net: &nn::Linear, x| {
        Ok((x.tensor("real")?.apply(net), x.tensor("fake")?.apply(net)))
    });
    // Each task trains one network. The other one is a constant in it.
    graph.add("fake", generator.share(|net, x| Ok(x.tensor("noise")?.apply(net))), "critic")?;
    graph.add("judged", critic.share(|net, x| Ok(x.tensor("fake")?.apply(net))), "generator")?;
    graph.add("fake", generator.optimizer(Sgd::new(0.1)), "generator")?;
    graph.add("judged", critic.optimizer(Sgd::new(0.1)), "critic")?;

    let critic_loss = LossNode::new(|x| {
        let judged = x.get::<(Tensor, Tensor)>("judged")?;
        Ok((&judged.1 - &judged.0).mean(Kind::Float))
    });
    let generator_loss = LossNode::new(|x| Ok(-x.tensor("judged")?.mean(Kind::Float)));
    graph.add("loss", critic_loss, "critic")?.add("loss", generator_loss, "generator")?;

    let tasks = Repeat::new(3).then(Task::train("critic").steps(1)).then(Task::train("generator").steps(1));
    // ANCHOR_END: gan
    Ok((graph, tasks))
}

#[test]
fn shared_modules_are_constants_in_steps_that_do_not_train_them() {
    // The mean of the samples of all ranks.
    let mean = 3.5 / 8.0;
    let ([mut slope, mut height], mut critic) = ([0.5, 0.25], 0.5);
    for _ in 0..3 {
        critic -= 0.1 * (slope * mean + height - mean);
        slope += 0.1 * critic * mean;
        height += 0.1 * critic;
    }
    let expected = [slope, height, critic, 0.25];
    let out = tempfile::tempdir().unwrap();
    let ends = as_ranks(2, |worker| {
        let (graph, tasks) = adversaries().unwrap();
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
        let generator = graph.node::<ModuleNode<nn::Linear, Tensor>>("generator/fake").unwrap();
        let critic = graph.node::<ModuleNode<nn::Linear, (Tensor, Tensor)>>("critic/judged").unwrap();
        let of = |net: &nn::Linear| [&net.ws, net.bs.as_ref().unwrap()].map(|part| part.sum(Kind::Double));
        let [slope, height] = of(generator.module().unwrap());
        let [weight, offset] = of(critic.module().unwrap());
        [slope, height, weight, offset].map(|value| value.double_value(&[]))
    });
    assert_eq!(ends[0], ends[1]);
    for (got, expected) in ends[0].iter().zip(expected) {
        assert!((got - expected).abs() < 1e-5, "{ends:?} for {expected:?}");
    }

    let (graph, _) = adversaries().unwrap();
    graph.eager(Device::Cpu, 0).unwrap().train_step("generator").unwrap();
    let critic = graph.node::<ModuleNode<nn::Linear, (Tensor, Tensor)>>("critic/judged").unwrap();
    let weight = critic.module().unwrap().ws.shallow_clone();
    assert!(weight.requires_grad() && !weight.grad().defined());
    drop(critic);

    let (mut graph, _) = adversaries().unwrap();
    graph.remove_node("critic/judged").unwrap();
    let eager = graph.eager(Device::Cpu, 0).unwrap();
    let error = eager.train_step("generator").unwrap_err().to_string();
    assert!(error.contains("`generator/judged`") && error.contains("add that node, too"), "{error}");
}

#[test]
fn gradients_of_two_uses_in_one_step_are_added() {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(8)).batch_size(8), "*").unwrap();
    let net = ModuleNode::new(line, |net: &nn::Linear, x| Ok(x.tensor("x")?.apply(net)));
    graph.add("again", net.share(|net, x| Ok(x.tensor("net")?.apply(net))), "*").unwrap();
    graph.add("net", net.optimizer(Sgd::new(0.1)), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("again")?.mean(Kind::Float))), "*").unwrap();
    graph.eager(Device::Cpu, 0).unwrap().train_step("*").unwrap();
    let net = graph.node::<ModuleNode<nn::Linear, Tensor>>("net").unwrap();
    // The loss is w (w x + b) + b.
    let expected = 0.5 - 0.1 * (2.0 * 0.5 * 3.5 / 8.0 + 0.25);
    let got = net.module().unwrap().ws.double_value(&[0, 0]);
    assert!((got - expected).abs() < 1e-6, "{got} for {expected}");
}

#[test]
fn buffers_of_a_shared_module_are_those_of_rank_0() {
    let out = tempfile::tempdir().unwrap();
    let means = as_ranks(2, |worker| {
        let mut graph = HyperGraph::new();
        graph.add("x", DatasetNode::new(Line(8)).batch_size(8), "*").unwrap();
        graph
            .add(
                "net",
                ModuleNode::new(line, |net: &nn::Linear, x| Ok(x.tensor("x")?.apply(net)))
                    .optimizer(Sgd::new(0.1)),
                "*",
            )
            .unwrap();
        let norm = ModuleNode::new(
            |path: &nn::Path| nn::batch_norm1d(path, 1, Default::default()),
            |norm: &nn::BatchNorm, x| Ok(x.tensor("net")?.apply_t(norm, x.is_training())),
        );
        let shared = norm.share(|norm, x| Ok(x.tensor("net")?.apply_t(norm, x.is_training())));
        graph.add("norm", norm.optimizer(Sgd::new(0.1)), "first").unwrap();
        graph.add("norm", shared, "second").unwrap();
        graph.add("loss", LossNode::new(|x| Ok(x.tensor("norm")?.square().mean(Kind::Float))), "*").unwrap();
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        Run::execute(&graph, &Task::train("second"), Rc::new(worker), config).unwrap();
        let norm = graph.node::<ModuleNode<nn::BatchNorm, Tensor>>("first/norm").unwrap();
        norm.module().unwrap().running_mean.double_value(&[0])
    });
    assert!(means[0] == means[1] && means[0] != 0.0, "{means:?}");
}

#[test]
fn sparse_gradients_are_refused_by_the_name_of_the_parameter() {
    let graph = || {
        let mut graph = HyperGraph::new();
        graph.add("x", DatasetNode::new(Line(8)).batch_size(4), "*").unwrap();
        let net = ModuleNode::new(
            |path: &nn::Path| (path / "rows").randn("weight", &[8, 3], 0.0, 1.0),
            |table: &Tensor, x| {
                let rows = (x.tensor("x")? * 8.0).to_kind(Kind::Int64).squeeze_dim(1);
                Ok(Tensor::embedding(table, &rows, -1, false, true))
            },
        );
        graph.add("table", net.optimizer(Sgd::new(0.1)), "*").unwrap();
        graph.add("loss", LossNode::new(|x| Ok(x.tensor("table")?.square().mean(Kind::Float))), "*").unwrap();
        graph
    };
    let check = |error: String| {
        let named = ["node `*/table`", "gradient of `rows.weight` is sparse", "with `sparse` false"];
        assert!(named.iter().all(|named| error.contains(named)), "{error}");
    };
    let graph_alone = graph();
    check(graph_alone.eager(Device::Cpu, 0).unwrap().train_step("*").unwrap_err().to_string());
    let out = tempfile::tempdir().unwrap();
    let errors = as_ranks(2, |worker| {
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        Run::execute(&graph(), &Task::train("*"), Rc::new(worker), config).unwrap_err().to_string()
    });
    errors.into_iter().for_each(check);
}

/// Trains a policy over two arms without data by REINFORCE: the second arm pays. Ranks draw
/// independently and learn together.
#[test]
fn policy_learns_from_gradients_of_its_own_which_ranks_average() {
    for ranks in [1, 2] {
        let policies: Vec<Vec<f64>> = on_ranks(ranks, |rank| {
            let mut graph = HyperGraph::new();
            let net = ModuleNode::new(
                |path| (path.zeros("policy", &[2]), path.zeros("unused", &[3])),
                |(policy, _), _| Ok(policy.shallow_clone()),
            );
            graph.add("policy", net.optimizer(Sgd::new(0.5)), "*").unwrap();
            let step = Cell::new(0);
            let learn = LossNode::with_backward(move |x| {
                let likelihood = x.tensor("policy")?.log_softmax(0, Kind::Float);
                step.set(step.get() + 1);
                // A single rank plays in each step.
                if x.is_training() && (ranks == 1 || step.get() % ranks == rank) {
                    let arm = tch::no_grad(|| likelihood.exp().multinomial(1, false)).int64_value(&[0]);
                    let reward = arm as f64;
                    (likelihood.get(arm) * -reward).f_backward()?;
                }
                Ok(likelihood.detach().exp().get(1))
            });
            graph.add("learn", learn, "*").unwrap();
            let seen = Rc::new(RefCell::default());
            let see = Rc::clone(&seen);
            let tasks = Repeat::once().then(Task::train("train").steps(40)).call(move |run| {
                let node = run.graph().node::<ModuleNode<(Tensor, Tensor), Tensor>>("policy")?;
                let (policy, unused) = node.module()?;
                *see.borrow_mut() = Vec::<f64>::try_from(policy.softmax(0, Kind::Double))?;
                assert!(!unused.grad().defined(), "no rank has used it");
                Ok(())
            });
            (graph, tasks, Box::new(move || seen.take()) as Box<_>)
        });
        assert!(policies[0][1] > 0.8, "{ranks} ranks: {policies:?}");
        assert!(policies.iter().all(|policy| *policy == policies[0]), "{policies:?}");
    }
}

/// Runs backward itself, through the module node `net`.
struct Learner;

impl Node for Learner {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let loss = x.tensor("net")?.square().mean(Kind::Float);
        if x.is_training() {
            loss.f_backward()?;
        }
        Ok(Value::new(loss.detach()))
    }

    fn goes_backward(&self) -> bool {
        true
    }
}

/// Descends the slope of the same loss itself, without libtorch's gradients.
struct Alone {
    weight: f64,
    worker: Option<Rc<Worker>>,
    slope: f64,
    weights: Rc<Cell<f64>>,
}

impl Node for Alone {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        self.worker = Some(Rc::clone(&context.worker));
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        if x.is_training() {
            self.slope = 2.0 * self.weight * x.tensor("x")?.square().mean(Kind::Float).double_value(&[]);
        }
        Ok(Value::new(()))
    }

    fn goes_backward(&self) -> bool {
        true
    }

    fn update(&mut self) -> Result<()> {
        let worker = self.worker.as_ref().unwrap();
        let slope = Tensor::from_slice(&[self.slope]);
        worker.all_reduce_sum(&slope)?;
        self.weight -= 0.5 * slope.double_value(&[0]) / worker.world_size() as f64;
        self.weights.set(self.weight);
        Ok(())
    }
}

#[test]
fn nodes_of_ones_own_train_without_a_loss_node() {
    let train = |trainer: &'static str| {
        on_ranks(2, move |_| {
            let mut graph = HyperGraph::new();
            graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "*").unwrap();
            let seen = Rc::new(Cell::new(0.0));
            let see = Rc::clone(&seen);
            if trainer == "alone" {
                let alone = Alone { weight: 1.0, worker: None, slope: 0.0, weights: see };
                graph.add("alone", alone, "*").unwrap();
            } else {
                let net = ModuleNode::new(
                    |path| path.ones("w", &[1]),
                    move |w, x| {
                        see.set(w.double_value(&[0]));
                        Ok(x.tensor("x")? * w)
                    },
                );
                graph.add("net", net.optimizer(Sgd::new(0.5)), "*").unwrap();
                let loss = |x: &Outputs| Ok(x.tensor("net")?.square().mean(Kind::Float));
                match trainer {
                    "learner" => graph.add("learner", Learner, "train").unwrap(),
                    _ => graph.add("loss", LossNode::new(loss), "train").unwrap(),
                };
            }
            // The evaluation observes the weight after the training.
            let tasks = Repeat::once().then(Task::train("train").steps(3)).then(Task::eval("val").steps(1));
            (graph, tasks, Box::new(move || seen.get()) as Box<dyn Fn() -> f64>)
        })
    };
    let expected = train("loss");
    assert!(expected[0] < 0.9, "{expected:?}");
    for trainer in ["learner", "alone"] {
        let found = train(trainer);
        assert_eq!(found[0], found[1], "{trainer}");
        assert!((found[0] - expected[0]).abs() < 1e-6, "{trainer}: {found:?}, {expected:?}");
    }
}

#[test]
fn training_task_without_loss_names_the_ways_out() {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "*").unwrap();
    let error = graph.eager(Device::Cpu, 0).unwrap().train_step("*").unwrap_err().to_string();
    let ways = ["add a LossNode", "LossNode::with_backward", "Node::goes_backward", "Task::eval"];
    assert!(ways.iter().all(|way| error.contains(way)), "{error}");
}

#[test]
fn losses_that_leave_the_backward_pass_to_the_step_and_that_do_not_are_named() {
    let error = |second: fn(Function) -> LossNode, scaler: bool| {
        let errors = as_ranks(1, |worker| {
            let mut graph = HyperGraph::new();
            let net = ModuleNode::new(|path| path.ones("w", &[1]), |w, _| Ok(w.shallow_clone()));
            graph.add("net", net.optimizer(Sgd::new(0.25)), "*").unwrap();
            let loss = |x: &Outputs| Ok(x.tensor("net")?.square().sum(Kind::Float));
            graph.add("first", LossNode::with_backward(loss), "*").unwrap();
            graph.add("second", second(Box::new(loss)), "*").unwrap();
            if scaler {
                graph.grad_scaler(GradScaler::new()).unwrap();
            }
            let out = tempfile::tempdir().unwrap();
            let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
            let tasks = Repeat::once().then(Task::train("train").steps(1));
            Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap_err().to_string()
        });
        errors.concat()
    };
    let mixed = error(LossNode::new, false);
    assert!(mixed.contains("`*/second` leaves the backward pass to the step"), "{mixed}");
    let weighed = error(|loss| LossNode::with_backward(loss).weight(2.0), false);
    assert!(weighed.contains("`*/first` and `*/second` weigh differently"), "{weighed}");
    let scaled = error(LossNode::with_backward, true);
    assert!(scaled.contains("a gradient scaler needs the backward pass of the step"), "{scaled}");
}
