//! Measures depend neither on the number of ranks nor on the step of an interruption.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use common::{Line, as_ranks};
use ice_core::meter::{Accuracy, Average, ConfusionMatrix, Dict, Meter, MovingAverage, Summation, Value};
use ice_core::optim::Sgd;
use ice_core::{
    DatasetNode, HyperGraph, LossNode, MetricNode, ModuleNode, Repeat, ResumeFrom, Run, RunConfig, Task,
};
use ice_worker::Worker;
use proptest::prelude::*;
use proptest::sample::SizeRange;
use tch::{Device, Kind, Tensor, nn};

const CLASSES: i64 = 4;

/// A sample: its rank, and the measured value in eighths, so that sums in f64 are exact.
type Sample = (usize, i16);

/// All measures, as bits.
type Measured = Vec<(String, u64)>;

fn numbers(samples: &[Sample]) -> Tensor {
    Tensor::from_slice(&samples.iter().map(|(_, eighths)| f32::from(*eighths) / 8.0).collect::<Vec<_>>())
}

fn classes(samples: &[Sample], factor: i64) -> Tensor {
    let class = |eighths: i16| (i64::from(eighths) * factor).rem_euclid(CLASSES);
    Tensor::from_slice(&samples.iter().map(|(_, eighths)| class(*eighths)).collect::<Vec<_>>())
}

/// Returns an input for each name that occurs in the samples.
fn by_name(samples: &[Sample]) -> Vec<(String, Tensor)> {
    let mut names = BTreeMap::<_, Vec<Sample>>::new();
    for sample in samples {
        names.entry(format!("of {}", sample.1.rem_euclid(3))).or_default().push(*sample);
    }
    names.into_iter().map(|(name, samples)| (name, numbers(&samples))).collect()
}

fn measure<M: Meter>(
    into: &mut Measured,
    name: &str,
    mut meter: M,
    worker: &Worker,
    batches: &[Vec<Sample>],
    synced: usize,
    input: impl Fn(&[Sample]) -> M::Input,
) {
    for (index, batch) in batches.iter().enumerate() {
        let own: Vec<_> = match worker.world_size() {
            1 => batch.clone(),
            _ => batch.iter().copied().filter(|(rank, _)| *rank == worker.rank()).collect(),
        };
        if own.is_empty() {
            meter.skip()
        } else {
            meter.update(&input(&own)).unwrap()
        }
        if index == synced {
            meter.sync(worker).unwrap();
        }
    }
    meter.sync(worker).unwrap();
    let measured = meter.evaluate().unwrap();
    into.push((name.into(), measured.value.to_bits()));
    let mut parts = measured.parts;
    parts.sort_by(|(a, _), (b, _)| a.cmp(b));
    into.extend(parts.iter().map(|(part, value)| (format!("{name}.{part}"), value.to_bits())));
}

fn measure_all(worker: &Worker, batches: &[Vec<Sample>], synced: usize) -> Measured {
    let mut all = Measured::new();
    let window = || MovingAverage::window(3.try_into().unwrap());
    let scores =
        |samples: &[Sample]| (classes(samples, 3).one_hot(CLASSES).to_kind(Kind::Float), classes(samples, 1));
    measure(&mut all, "average", Average::new(), worker, batches, synced, numbers);
    measure(&mut all, "sum", Summation::new(), worker, batches, synced, numbers);
    measure(&mut all, "last", Value::new(), worker, batches, synced, numbers);
    measure(&mut all, "window", window(), worker, batches, synced, numbers);
    measure(&mut all, "decay", MovingAverage::decay(0.5), worker, batches, synced, numbers);
    measure(&mut all, "accuracy", Accuracy::new(), worker, batches, synced, scores);
    let confusion = ConfusionMatrix::new(CLASSES as usize);
    measure(&mut all, "confusion", confusion, worker, batches, synced, scores);
    measure(&mut all, "dict", Dict::default(), worker, batches, synced, by_name);
    // Only the first name depends on the ranks.
    all.retain(|(name, _)| name != "dict");
    all
}

fn batches() -> impl Strategy<Value = Vec<Vec<Sample>>> {
    let size = |range: std::ops::Range<usize>| SizeRange::from(range);
    // Rank 3 never has a sample, and sometimes rank 1 has all samples.
    let sample = (prop_oneof![3 => 0_usize..3, 1 => Just(1)], -64_i16..64);
    prop::collection::vec(prop::collection::vec(sample, size(1..8)), size(1..12))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_meter_over_ranks_is_the_meter_over_all(batches in batches(), synced in 0_usize..12) {
        let expected = measure_all(&Worker::alone(Device::Cpu), &batches, usize::MAX);
        for found in as_ranks(4, |worker| measure_all(&worker, &batches, synced)) {
            prop_assert_eq!(&found, &expected);
        }
    }
}

#[test]
fn the_names_of_a_dict_come_in_the_same_order_on_all_ranks() {
    let batches = [vec![(0, 2), (1, 1), (2, 0)]];
    let orders = as_ranks(3, |worker| {
        let own: Vec<_> = batches[0].iter().copied().filter(|(rank, _)| *rank == worker.rank()).collect();
        let mut meter = Dict::default();
        meter.update(&by_name(&own)).unwrap();
        meter.sync(&worker).unwrap();
        meter.evaluate().unwrap().parts
    });
    let expected = [("of 2".to_owned(), 0.25), ("of 1".to_owned(), 0.125), ("of 0".to_owned(), 0.0)];
    assert!(orders.iter().all(|order| *order == expected), "{orders:?}");
}

/// A training with 22 samples on 3 ranks, 2 per rank and step: the last step has 4 points, so that
/// rank 2 has 1.
struct Training<'a> {
    out: &'a Path,
    samples: usize,
    ranks: usize,
    batch: usize,
    from: Option<&'a str>,
}

impl Training<'_> {
    /// Returns the measures of the first epoch.
    fn run(&self) -> BTreeMap<String, f64> {
        let mut seen = as_ranks(self.ranks, |worker| {
            let seen = Rc::new(RefCell::new(BTreeMap::new()));
            let config = RunConfig {
                seed: 7,
                out_dir: self.out.to_owned(),
                save_every_steps: Some(1),
                resume_from: self
                    .from
                    .map(|name| ResumeFrom::Path(self.out.join("none_local/ckpts").join(name))),
                ..RunConfig::default()
            };
            Run::execute(&self.graph(), &tasks(&seen), Rc::new(worker), config).unwrap();
            seen.take()
        });
        let first = seen.remove(0);
        assert!(seen.iter().all(|other| *other == first), "{first:?} and {seen:?}");
        first
    }

    fn graph(&self) -> HyperGraph {
        let mut graph = HyperGraph::new();
        graph.add("x", DatasetNode::new(Line(self.samples)).batch_size(self.batch), "*").unwrap();
        let net = ModuleNode::new(
            |path| {
                let layer = nn::linear(path / "layer", 1, 1, Default::default());
                tch::no_grad(|| {
                    let _ = layer.ws.shallow_clone().fill_(1.0);
                    let _ = layer.bs.as_ref().unwrap().shallow_clone().zero_();
                });
                layer
            },
            |net, x| Ok(x.tensor("x")?.apply(net)),
        );
        // The parameters stay constant, so that the measures do not depend on the steps.
        graph.add("net", net.optimizer(Sgd::new(0.0)), "*").unwrap();
        graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.mean(Kind::Double))), "*").unwrap();
        graph.add("sum", MetricNode::sum(|x| Ok(x.tensor("x")?.to_kind(Kind::Double))), "*").unwrap();
        graph.add("count", MetricNode::sum(|x| Ok(x.tensor("x")?.ones_like())), "*").unwrap();
        graph.add("mean", MetricNode::average(|x| x.tensor("x")), "*").unwrap();
        let window = 2.try_into().unwrap();
        graph.add("recent", MetricNode::moving_average(window, |x| x.tensor("x")), "*").unwrap();
        graph.add("last", MetricNode::last(|x| x.tensor("x")), "*").unwrap();
        let scores = MetricNode::dict(|x| Ok(vec![("f1", x.tensor("x")?), ("half", x.tensor("x")? / 2.0)]));
        graph.add("scores", scores, "*").unwrap();
        graph
    }
}

fn tasks(seen: &Rc<RefCell<BTreeMap<String, f64>>>) -> Repeat {
    let seen = Rc::clone(seen);
    Repeat::once().then(Task::train("train")).call(move |run| {
        let names = ["loss", "sum", "count", "mean", "recent", "last", "scores", "scores.f1", "scores.half"];
        for name in names {
            seen.borrow_mut().insert(name.into(), run.measure(&format!("*/{name}"))?);
        }
        Ok(())
    })
}

#[test]
fn ranks_without_a_share_of_a_batch_do_not_count() {
    for (samples, ranks, batch) in [(22, 1, 6), (22, 3, 2), (19, 3, 2), (10, 3, 1), (22, 1, 3)] {
        let out = tempfile::tempdir().unwrap();
        let seen = Training { out: out.path(), samples, ranks, batch, from: None }.run();
        let n = samples as f64;
        let close = |name: &str, expected: f64| {
            let what = format!("{name} of {samples} on {ranks} ranks: {} and not {expected}", seen[name]);
            assert!((seen[name] - expected).abs() < 1e-6, "{what}");
        };
        assert_eq!(seen["count"], n);
        close("sum", (n - 1.0) / 2.0);
        let last = (samples - 1) % (ranks * batch) + 1;
        let mean_of_the_last = |count: usize| (n - (count as f64 + 1.0) / 2.0) / n;
        close("last", mean_of_the_last(last));
        close("recent", mean_of_the_last(last + ranks * batch));
        for name in ["loss", "mean", "scores", "scores.f1"] {
            close(name, (n - 1.0) / 2.0 / n);
        }
        close("scores.half", (n - 1.0) / 4.0 / n);
    }
}

#[test]
fn an_epoch_that_was_interrupted_measures_the_same() {
    let out = tempfile::tempdir().unwrap();
    let run = |from| Training { out: out.path(), samples: 32, ranks: 3, batch: 2, from }.run();
    let whole = run(None);
    // With 32 samples, all values and their sums are exact.
    for from in ["E0S1", "E0S3", "E0S5"] {
        assert_eq!(run(Some(from)), whole, "from {from}");
    }
}
