//! Overhead of the graph: the time of a step over nodes that do almost nothing. The throughput
//! counts nodes, so that its inverse is the time per node and step.
//!
//!     cargo bench -p ice-core --bench overhead

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ice_core::{Context, HyperGraph, LossNode, Node, Outputs, Repeat, Result, Run, RunConfig, Task, Value};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor};

const NODES: [usize; 3] = [1, 10, 100];

/// A node that computes nothing.
struct Idle;

impl Node for Idle {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> Result<Value> {
        Ok(Value::new(()))
    }
}

/// A node that passes on the output of the previous node. The first node outputs a scalar.
struct HandOn {
    scalar: Tensor,
    before: Option<String>,
}

impl Node for HandOn {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        Ok(Value::new(match &self.before {
            Some(before) => x.tensor(before)?,
            None => self.scalar.shallow_clone(),
        }))
    }
}

fn scalar() -> Tensor {
    Tensor::zeros([], (Kind::Float, Device::Cpu)).set_requires_grad(true)
}

fn add_idle(graph: &mut HyperGraph, nodes: usize) -> Result<()> {
    (0..nodes).try_for_each(|number| graph.add(&format!("node{number}"), Idle, "*").map(drop))
}

/// Adds a chain of nodes, the last one first, so that the nodes run within each other.
fn add_chain(graph: &mut HyperGraph, nodes: usize) -> Result<()> {
    (0..nodes).rev().try_for_each(|number| {
        let before = number.checked_sub(1).map(|before| format!("node{before}"));
        graph.add(&format!("node{number}"), HandOn { scalar: scalar(), before }, "*").map(drop)
    })
}

/// Returns the time of `count` steps.
fn steps(count: u64, train: bool, add: impl Fn(&mut HyperGraph) -> Result<()>) -> Result<Duration> {
    let out =
        tempfile::tempdir().map_err(|source| ice_core::Error::Io { path: "a folder".into(), source })?;
    let config = RunConfig { out_dir: out.path().to_owned(), log_every: None, ..RunConfig::default() };
    let mut graph = HyperGraph::new();
    add(&mut graph)?;
    let task = if train { Task::train("bench") } else { Task::eval("bench") };
    let (began, took) = (Rc::new(Cell::new(Instant::now())), Rc::new(Cell::new(Duration::ZERO)));
    let (begin, end) = (Rc::clone(&began), Rc::clone(&took));
    let tasks = Repeat::once()
        .call(move |_| {
            begin.set(Instant::now());
            Ok(())
        })
        .then(task.steps(count))
        .call(move |_| {
            end.set(began.get().elapsed());
            Ok(())
        });
    Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config)?;
    Ok(took.get())
}

fn measure(
    criterion: &mut Criterion,
    name: &str,
    train: bool,
    add: impl Fn(&mut HyperGraph, usize) -> Result<()>,
) {
    let mut group = criterion.benchmark_group(name);
    for nodes in NODES {
        group.throughput(Throughput::Elements(nodes as u64));
        group.bench_with_input(BenchmarkId::from_parameter(nodes), &nodes, |bencher, &nodes| {
            bencher.iter_custom(|count| {
                steps(count, train, |graph| add(graph, nodes)).unwrap_or_else(|error| panic!("{error}"))
            });
        });
    }
    group.finish();
}

fn overhead(criterion: &mut Criterion) {
    measure(criterion, "eval, idle nodes", false, add_idle);
    measure(criterion, "eval, a chain that hands on a tensor", false, add_chain);
    // A training step has a loss and libtorch's backward pass from it. This is the baseline of the
    // numbers that follow.
    let with_loss = |graph: &mut HyperGraph| {
        let leaf = scalar();
        graph.add("loss", LossNode::new(move |_| Ok(&leaf + 0.0)), "*").map(drop)
    };
    measure(criterion, "train, the loss alone", true, |graph, _| with_loss(graph));
    measure(criterion, "train, the loss and idle nodes", true, |graph, nodes| {
        add_idle(graph, nodes)?;
        with_loss(graph)
    });
}

criterion_group!(benches, overhead);
criterion_main!(benches);
