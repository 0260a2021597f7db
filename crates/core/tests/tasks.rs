//! Tasks that are left, runs that are ended, and graphs that are run by hand.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use common::{Line, on_ranks, turn};
use ice_core::optim::Sgd;
use ice_core::{DatasetNode, Error, HyperGraph, LossNode, ModuleNode, Repeat, Run, Task};
use tch::{Device, Kind, nn};

/// A graph without a loss.
fn net() -> HyperGraph {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "*").unwrap();
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 1, Default::default()),
        |net: &nn::Linear, x| Ok(x.tensor("x")?.apply(net)),
    );
    graph.add("net", net.optimizer(Sgd::new(0.1)), "*").unwrap();
    graph
}

/// A graph whose training fails in this step, counted from 1.
fn graph(fails: Option<(u64, fn() -> Error)>) -> HyperGraph {
    let mut graph = net();
    let step = Cell::new(0);
    let loss = LossNode::new(move |x| {
        step.set(step.get() + u64::from(x.is_training()));
        match fails {
            Some((when, error)) if x.is_training() && when == step.get() => Err(error()),
            _ => Ok(x.tensor("net")?.square().mean(Kind::Float)),
        }
    });
    graph.add("loss", loss, "*").unwrap();
    graph
}

/// Steps of training and of evaluation, and whether the closure at the end ran.
fn outcome(fails: Option<(u64, fn() -> Error)>) -> (u64, u64, bool) {
    let mut outcomes = on_ranks(2, |_| {
        let seen = Rc::new(RefCell::new((0, 0, false)));
        let (see, last) = (Rc::clone(&seen), Rc::clone(&seen));
        let note = move |run: &Run| {
            let counters = run.counters();
            *see.borrow_mut() = (counters.train_steps(), counters.eval_steps(), false);
            Ok(())
        };
        let tasks = Repeat::once()
            .then(Task::train("train").steps(5))
            .call(note.clone())
            .then(Task::eval("val").steps(1))
            .call(note)
            .call(move |_| {
                last.borrow_mut().2 = true;
                Ok(())
            });
        (graph(fails), tasks, Box::new(move || *seen.borrow()) as Box<_>)
    });
    assert_eq!(outcomes[0], outcomes[1]);
    outcomes.remove(0)
}

#[test]
fn a_task_can_be_left_and_a_run_ended() {
    assert_eq!(outcome(None), (5, 1, true));
    assert_eq!(outcome(Some((3, || Error::StopTask))), (2, 1, true));
    assert_eq!(outcome(Some((3, || Error::StopAllTasks))), (0, 0, false));
}

#[test]
fn a_graph_is_run_by_hand() {
    let _turn = turn();
    let graph = graph(None);
    let eager = graph.eager(Device::Cpu, 1).unwrap();
    let look = || eager.forward("val", |x| Ok(x.tensor("net")?.requires_grad())).unwrap();
    assert!(!look());
    let losses: Vec<f64> = (0..8).map(|_| eager.train_step("train").unwrap()).collect();
    // Four batches are an epoch, and after it the first one comes again.
    let [first, second] = [0, 4].map(|at| losses[at..at + 4].iter().sum::<f64>());
    assert!(0.0 < second && second < first, "{losses:?}");
    let error = eager.forward("val", |x| x.tensor("nothing")).unwrap_err().to_string();
    assert!(error.contains("`*/net`"), "{error}");
}

#[test]
fn steps_are_one_epoch_where_that_is_said() {
    let seen = |whole: bool| {
        let mut seen = on_ranks(2, |_| {
            let seen = Rc::new(Cell::new((0_u64, f64::NAN)));
            let see = Rc::clone(&seen);
            let steps = Task::train("train").steps(5);
            let tasks =
                Repeat::once().then(if whole { steps.simulate_epoch() } else { steps }).call(move |run| {
                    see.set((run.counters().train_epochs(), run.measure("*/loss")?));
                    Ok(())
                });
            // Two steps are a pass, and each loss is the number of its step.
            let mut graph = net();
            let step = Cell::new(0.0);
            let loss = LossNode::new(move |x| {
                step.set(step.get() + 1.0);
                Ok(x.tensor("net")?.sum(Kind::Float) * 0.0 + step.get())
            });
            graph.add("loss", loss, "*").unwrap();
            (graph, tasks, Box::new(move || seen.get()) as Box<_>)
        });
        seen.remove(0)
    };
    assert_eq!(seen(true), (1_u64, 3.0));
    assert_eq!(seen(false), (2_u64, 3.5));
}
