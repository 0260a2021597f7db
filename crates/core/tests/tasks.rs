//! Tasks that are left, runs that end early, and graphs that are run by hand.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::{Line, as_ranks, on_ranks, turn};
use ice_core::optim::{Optimizer, Schedule, Sgd};
use ice_core::{
    Better, Context, DatasetNode, EarlyStop, Error, HyperGraph, LossNode, MetricNode, ModuleNode, Node,
    Outputs, ReduceLROnPlateau, Repeat, ResumeFrom, Run, RunConfig, SaveCheckpoint, Task, TaskItem, Value,
};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

/// Creates a graph without a loss.
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

/// Creates a graph whose training fails in this step, counted from 1.
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

/// Returns the numbers of training and evaluation steps, and whether the last closure ran.
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
    // Four batches are an epoch, after which the first batch follows again.
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
            // Two steps are a pass, and the loss of each step is its number.
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

/// Returns the notes of the tasks' closures, after a check that they are equal on all ranks.
fn notes_of_ranks(make: impl Fn(usize, &Notes) -> (HyperGraph, Repeat) + Sync) -> Vec<String> {
    let mut notes = on_ranks(2, |rank| {
        let notes = Notes::default();
        let (graph, tasks) = make(rank, &notes);
        (graph, tasks, Box::new(move || notes.0.borrow().clone()) as Box<_>)
    });
    assert_eq!(notes[0], notes[1]);
    notes.remove(0)
}

#[derive(Clone, Default)]
struct Notes(Rc<RefCell<Vec<String>>>);

impl Notes {
    /// Returns a closure that notes the counters.
    fn counters(&self, what: &str) -> impl Fn(&Run) -> ice_core::Result<()> + use<> {
        let (notes, what) = (self.clone(), what.to_owned());
        move |run| {
            let counters = run.counters();
            notes.add(format!("{what} {} {}", counters.train_steps(), counters.eval_steps()));
            Ok(())
        }
    }

    fn add(&self, note: String) {
        self.0.borrow_mut().push(note);
    }
}

#[test]
fn closure_of_one_rank_ends_the_run_or_leaves_its_repetition_on_all() {
    let notes = |what: fn(&Run) -> ice_core::Result<()>| {
        notes_of_ranks(|rank, notes| {
            let step = Repeat::new(5).then(Task::train("train").steps(1)).call(notes.counters("step")).call(
                move |run| match run.counters().train_steps() {
                    2 if rank == 1 => what(run),
                    _ => Ok(()),
                },
            );
            (
                graph(None),
                Repeat::new(2).then(step).then(Task::eval("val").steps(1)).call(notes.counters("after")),
            )
        })
    };
    // The second turn leaves the inner repetition, which runs completely when it is repeated.
    let after_leaving = [
        "step 1 0",
        "step 2 0",
        "after 2 1",
        "step 3 1",
        "step 4 1",
        "step 5 1",
        "step 6 1",
        "step 7 1",
        "after 7 2",
    ];
    let left = |run: &Run| {
        run.stop_task();
        Ok(())
    };
    assert_eq!(notes(left), after_leaving);
    assert_eq!(notes(|_| Err(Error::StopTask)), after_leaving);
    let ended = |run: &Run| {
        run.stop_all_tasks();
        Ok(())
    };
    assert_eq!(notes(ended), ["step 1 0", "step 2 0"]);
    assert_eq!(notes(|_| Err(Error::StopAllTasks)), ["step 1 0", "step 2 0"]);
}

/// Creates a graph with a node that calls `watch` in each step of training and of evaluation,
/// counted from 1.
fn graph_with(watch: impl Fn(&Outputs, u64) -> ice_core::Result<()> + 'static) -> HyperGraph {
    let mut graph = graph(None);
    let seen = Cell::new([0, 0]);
    let sum = MetricNode::sum(move |x| {
        let mut steps = seen.get();
        steps[usize::from(x.is_training())] += 1;
        seen.set(steps);
        watch(x, steps[usize::from(x.is_training())])?;
        x.tensor("x")
    });
    graph.add("sum", sum, "*").unwrap();
    graph
}

#[test]
fn node_of_one_rank_makes_all_leave_the_task_at_the_same_step() {
    let leave = |x: &Outputs, steps: &[u64], step: u64| {
        if steps.contains(&step) {
            x.stop_task();
        }
        Ok(())
    };
    let notes = |steps: [&'static [u64]; 2]| {
        notes_of_ranks(move |rank, notes| {
            let graph = graph_with(move |x, step| leave(x, steps[rank], step));
            let tasks = Repeat::once()
                .then(Task::train("train").epochs(9))
                .call(notes.counters("trained"))
                .then(Task::eval("val").epochs(9))
                .call(notes.counters("evaluated"));
            (graph, tasks)
        })
    };
    // If all ranks ask, they leave at once. Otherwise the other rank may be a step ahead, or many
    // steps in an evaluation.
    assert_eq!(notes([&[3], &[3]])[0], "trained 3 0");
    for steps in [[&[3][..], &[]], [&[], &[3]]] {
        let notes = notes(steps);
        assert!(["trained 3 0", "trained 4 0"].contains(&notes[0].as_str()), "{notes:?}");
        let evaluated: u64 = notes[1].rsplit(' ').next().unwrap().parse().unwrap();
        assert!((3..=18).contains(&evaluated), "{notes:?}");
    }
    // A wish in the last step of a task does not leave the next task.
    assert_eq!(notes([&[18], &[]]), ["trained 18 0", "evaluated 18 18"]);
}

#[test]
fn node_of_one_rank_ends_the_run_on_all() {
    let notes = notes_of_ranks(|rank, notes| {
        let graph = graph_with(move |x, step| {
            if x.is_training() && rank == 1 && step == 2 {
                x.stop_all_tasks();
            }
            Ok(())
        });
        // The wish comes in the last step of its task, so that the next closure acts on it.
        (graph, Repeat::new(3).then(Task::train("train").steps(2)).call(notes.counters("step")))
    });
    assert_eq!(notes, ["step 2 0"]);
}

#[test]
fn node_error_that_leaves_a_step_on_one_rank_alone_names_both() {
    for (train, alone) in [(true, 0), (true, 1), (false, 0), (false, 1)] {
        let out = tempfile::tempdir().unwrap();
        let errors = as_ranks(2, |worker| {
            let rank = worker.rank();
            let leaves = move |_: &Outputs, step| {
                if rank == alone && step == 2 { Err(Error::StopTask) } else { Ok(()) }
            };
            let graph = graph_with(leaves);
            let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
            let task = if train { Task::train("train") } else { Task::eval("val") };
            let outcome = Run::execute(&graph, &Repeat::new(3).then(task), Rc::new(worker), config);
            outcome.unwrap_err().to_string()
        });
        let wanted = [format!("rank {alone} has left"), format!("rank {} has not", 1 - alone)];
        assert!(wanted.iter().all(|wanted| errors[alone].contains(wanted)), "{errors:?}");
    }
}

/// An item of the task list that returns an error each time it runs, or succeeds without an error.
struct Leaves(Option<fn() -> Error>);

impl TaskItem for Leaves {
    fn run(&self, _: &Run) -> ice_core::Result<()> {
        self.0.map_or(Ok(()), |error| Err(error()))
    }

    fn is_finished(&self) -> bool {
        false
    }

    fn reset(&self) {}

    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn load_state(&self, _: &serde_json::Value, _: bool) -> ice_core::Result<()> {
        Ok(())
    }

    fn epochs(&self, _: bool) -> u64 {
        0
    }
}

#[test]
fn ranks_agree_on_what_an_item_of_ones_own_leaves() {
    let run = |errors: [Option<fn() -> Error>; 2]| {
        let out = tempfile::tempdir().unwrap();
        as_ranks(2, |worker| {
            let rank = worker.rank();
            let notes = Rc::new(RefCell::new(Vec::new()));
            let note = |text: &'static str| {
                let notes = Rc::clone(&notes);
                move |_: &Run| {
                    notes.borrow_mut().push(text);
                    Ok(())
                }
            };
            // The second loop is left, too, without a step between the loops.
            let leaving = || Repeat::new(3).call(note("turn")).then(Leaves(errors[rank]));
            let tasks = Repeat::once()
                .then(leaving())
                .then(leaving())
                .then(Task::train("train").steps(1))
                .call(note("end"));
            let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
            let outcome = Run::execute(&graph(None), &tasks, Rc::new(worker), config);
            (notes.take(), outcome.map_err(|error| error.to_string()))
        })
    };
    let [task, all]: [fn() -> Error; 2] = [|| Error::StopTask, || Error::StopAllTasks];
    let outcomes = run([Some(task), Some(task)]);
    assert!(outcomes.iter().all(|outcome| *outcome == (vec!["turn", "turn", "end"], Ok(()))), "{outcomes:?}");
    // The most that any rank asks for counts.
    for errors in [[Some(all), Some(all)], [Some(task), Some(all)], [Some(all), Some(task)]] {
        let outcomes = run(errors);
        assert!(outcomes.iter().all(|outcome| *outcome == (vec!["turn"], Ok(()))), "{outcomes:?}");
    }
    for (alone, error) in [(0, task), (1, task), (0, all), (1, all)] {
        let mut errors = [None; 2];
        errors[alone] = Some(error);
        let message = run(errors)[alone].1.clone().unwrap_err();
        let wanted = [format!("rank {alone} has left an item"), format!("rank {} has not", 1 - alone)];
        assert!(wanted.iter().all(|wanted| message.contains(wanted)), "{message}");
    }
}

#[test]
fn nodes_that_leave_a_step_by_different_errors_leave_the_most() {
    let notes = notes_of_ranks(|rank, notes| {
        let graph = graph_with(move |_, step| match step {
            2 => Err([Error::StopTask, Error::StopAllTasks].into_iter().nth(rank).unwrap()),
            _ => Ok(()),
        });
        (graph, Repeat::once().then(Task::train("train").steps(4)).call(notes.counters("step")))
    });
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn step_is_left_by_an_error_while_requests_are_pending() {
    let make = |rank: usize, notes: &Notes| {
        let worker = Rc::new(RefCell::new(None));
        let mut graph = graph_with({
            let worker = Rc::clone(&worker);
            move |_, step| {
                if step < 2 {
                    return Ok(());
                }
                let known = worker.borrow();
                let worker: &Rc<Worker> = known.as_ref().unwrap();
                if rank == 0 {
                    // The requests are for another task, so that no rank acts on them.
                    worker.ask_to_leave(false, u64::MAX)?;
                    worker.ask_to_leave(false, u64::MAX)?;
                }
                worker.barrier()?;
                Err(Error::StopTask)
            }
        });
        graph.add("knows", Knows(worker), "*").unwrap();
        (graph, Repeat::once().then(Task::train("train").steps(4)).call(notes.counters("step")))
    };
    // Ranks that cannot agree would wait forever.
    let (done, notes) = mpsc::channel();
    thread::spawn(move || done.send(notes_of_ranks(make)));
    assert_eq!(notes.recv_timeout(Duration::from_secs(60)).unwrap(), ["step 1 0"]);
}

/// Stores the worker.
struct Knows(Rc<RefCell<Option<Rc<Worker>>>>);

impl Node for Knows {
    fn set_up(&mut self, context: &Context) -> ice_core::Result<()> {
        self.0.replace(Some(Rc::clone(&context.worker)));
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> ice_core::Result<Value> {
        Ok(Value::new(()))
    }
}

#[test]
fn step_that_is_left_measures_nothing_later() {
    let measured = |left: bool| {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let see = Rc::clone(&seen);
        let mut graph = graph_with(|_, _| Ok(()));
        graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "val").unwrap();
        let steps = Cell::new(0);
        let last = MetricNode::sum(move |x| {
            let _ = x.tensor("sum")?;
            steps.set(steps.get() + 1);
            if left && [2, 5].contains(&steps.get()) { Err(Error::StopTask) } else { x.tensor("x") }
        });
        graph.add("last", last, "*").unwrap();
        // The second step of each task is left after `sum` has measured in it.
        let tasks = Repeat::once()
            .then(Task::train("train").steps(if left { 2 } else { 1 }))
            .then(Task::train("train").steps(1).simulate_epoch())
            .then(Task::eval("val").steps(if left { 2 } else { 0 }))
            .then(Task::eval("val"))
            .call(move |run| {
                see.borrow_mut().push((run.measure("*/sum")?, run.counters().eval_steps()));
                Ok(())
            });
        let _turn = turn();
        let out = tempfile::tempdir().unwrap();
        let config = RunConfig { seed: 7, out_dir: out.path().to_owned(), ..RunConfig::default() };
        Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
        seen.take()
    };
    // The points 0, 1/8, … 7/8: an evaluation starts at the first point, independent of tasks that
    // were left before.
    let sum = (0..8).map(|point| f64::from(point) / 8.0).sum::<f64>();
    for left in [false, true] {
        let measured = measured(left);
        assert!((measured[0].0 - sum).abs() < 1e-6, "{left}: {measured:?}");
    }
}

/// Trains in one process, with a validation loss of the given values. Returns the number of turns,
/// counted from the start or from the checkpoint `from`.
fn turns(
    losses: &'static [f64],
    out: &std::path::Path,
    from: Option<&str>,
    stop: impl Fn(Repeat) -> Repeat,
) -> u64 {
    let _turn = turn();
    // There are more samples than steps, so that no epoch ends.
    let mut graph = net();
    graph.add("x", DatasetNode::new(Line(40)).batch_size(2), "train").unwrap();
    let loss = move |x: &Outputs| Ok(x.tensor("net")?.sum(Kind::Float) * 0.0);
    graph.add("loss", LossNode::new(loss), "train").unwrap();
    let at = Rc::new(Cell::new(0));
    let number = Rc::clone(&at);
    let measured = MetricNode::last(move |_| Ok(Tensor::from_slice(&[losses[number.get() as usize - 1]])));
    graph.add("measured", measured, "val").unwrap();
    let now = Rc::clone(&at);
    let tasks = Repeat::new(losses.len() as u64)
        .then(Task::train("train").steps(1))
        .call(move |run| {
            now.set(run.counters().train_steps());
            Ok(())
        })
        .then(Task::eval("val").steps(1).simulate_epoch())
        .then(SaveCheckpoint::new());
    let from = from.map(|name| ResumeFrom::Path(out.join("none_local/ckpts").join(name)));
    let config = RunConfig { seed: 7, out_dir: out.to_owned(), resume_from: from, ..RunConfig::default() };
    Run::execute(&graph, &stop(tasks), Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
    at.get()
}

#[test]
fn early_stop_waits_for_its_patience_also_over_a_resume() {
    let stopped = |losses: &'static [f64], stop: &dyn Fn() -> EarlyStop| {
        let out = tempfile::tempdir().unwrap();
        let whole = turns(losses, out.path(), None, |tasks| tasks.then(stop()));
        for step in [1, whole - 1, whole] {
            let from = format!("E0S{step}");
            let resumed = turns(losses, out.path(), Some(&from), |tasks| tasks.then(stop()));
            assert_eq!(resumed, if step == whole { 0 } else { whole }, "from {from}");
        }
        whole
    };
    let lower = || EarlyStop::new("val/measured", Better::Lower).patience(2);
    assert_eq!(stopped(&[3.0, 4.0, 2.0, 2.5, f64::NAN, 1.0, 1.0], &lower), 5);
    assert_eq!(stopped(&[f64::NAN, 3.0, 2.0, 1.0], &lower), 4);
    let small = || lower().min_delta(0.5);
    assert_eq!(stopped(&[3.0, 2.6, 2.55, 1.0], &small), 3);
    let higher = || EarlyStop::new("val/measured", Better::Higher);
    assert_eq!(stopped(&[1.0, 2.0, 2.0, 3.0], &higher), 3);
}

#[test]
fn state_of_a_closure_keeps_infinities_over_a_resume_and_begins_again_with_its_repetition() {
    let out = tempfile::tempdir().unwrap();
    let losses = &[3.0, 2.0, 2.5, 2.6, 2.7, 1.0];
    let worse = |tasks: Repeat| {
        tasks.call_with((f64::INFINITY, 0), |run, (best, worse)| {
            let loss = run.measure("val/measured")?;
            *worse = if loss < *best { 0 } else { *worse + 1 };
            *best = best.min(loss);
            if *worse == 2 {
                run.stop_task();
            }
            Ok(())
        })
    };
    assert_eq!(turns(losses, out.path(), None, worse), 4);
    for from in ["E0S1", "E0S3"] {
        assert_eq!(turns(losses, out.path(), Some(from), worse), 4, "{from}");
    }
    let seen = Rc::new(RefCell::new(Vec::new()));
    let see = Rc::clone(&seen);
    let inner = Repeat::new(2).call_with(0, move |_, count| {
        *count += 1;
        see.borrow_mut().push(*count);
        Ok(())
    });
    let _turn = turn();
    let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
    Run::execute(&net(), &Repeat::new(2).then(inner), Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
    assert_eq!(*seen.borrow(), [1, 2, 1, 2]);
}

#[test]
fn nodes_see_where_the_run_is_also_after_a_resume() {
    let seen = |out: &std::path::Path, from: Option<&str>| {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let see = Rc::clone(&seen);
        // The loss is weighted by the number of the step.
        let mut graph = graph_with(move |x, _| {
            let size = x.epoch_iterations().unwrap();
            let folder = x.folder().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
            see.borrow_mut().push((
                (x.train_steps(), x.epoch(), x.iteration(), size),
                x.run_id().to_owned(),
                folder,
            ));
            Ok(())
        });
        let loss = |x: &Outputs| Ok(x.tensor("net")?.mean(Kind::Float) * x.train_steps() as f64);
        graph.add("annealed", LossNode::new(loss), "train").unwrap();
        graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "val").unwrap();
        let net = Rc::new(Cell::new(0.0));
        let weight = Rc::clone(&net);
        let tasks = Repeat::new(2)
            .then(Task::train("train").steps(3))
            .then(SaveCheckpoint::new())
            .then(Task::eval("val").steps(2).simulate_epoch())
            .call(move |run| {
                let node = run.graph().node::<ModuleNode<nn::Linear, Tensor>>("net")?;
                weight.set(node.module()?.ws.double_value(&[0, 0]));
                Ok(())
            });
        let _turn = turn();
        let from = from.map(|name| ResumeFrom::Path(out.join("none_local/ckpts").join(name)));
        let config =
            RunConfig { seed: 7, out_dir: out.to_owned(), resume_from: from, ..RunConfig::default() };
        Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
        (seen.take(), net.get())
    };
    let out = tempfile::tempdir().unwrap();
    let (whole, weight) = seen(out.path(), None);
    let places: Vec<_> = whole.iter().map(|(place, ..)| *place).collect();
    // Four batches are an epoch. The second training task consumes its last batch and two of the
    // next epoch.
    let first = [(0, 0, 0, 4), (1, 0, 1, 4), (2, 0, 2, 4), (3, 0, 0, 2), (3, 0, 1, 2)];
    let second = [(3, 0, 0, 1), (4, 1, 0, 4), (5, 1, 1, 4), (6, 1, 0, 2), (6, 1, 1, 2)];
    assert_eq!(places, [first, second].concat());
    assert!(whole.iter().all(|(_, run, folder)| run == "none" && folder == "none_local"), "{whole:?}");
    assert_eq!(seen(out.path(), Some("E0S3")), (whole[3..].to_vec(), weight));
}

/// SGD that records the learning rate of each step.
struct Recorded(Sgd, Rc<RefCell<Vec<f64>>>);

impl Optimizer for Recorded {
    fn set_up(&mut self, parameters: &[Tensor]) {
        self.0.set_up(parameters);
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> ice_core::Result<()> {
        self.1.borrow_mut().push(self.0.learning_rate());
        self.0.step(parameters, gradients)
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        self.0.state()
    }

    fn learning_rate(&self) -> f64 {
        self.0.learning_rate()
    }

    fn set_learning_rate(&mut self, learning_rate: f64) {
        self.0.set_learning_rate(learning_rate);
    }
}

/// Creates a net over eight points that records its learning rates.
fn recorded(
    batch_size: usize,
    optimizer: impl FnOnce(Recorded) -> ModuleNode<nn::Linear, Tensor>,
) -> (HyperGraph, Rc<RefCell<Vec<f64>>>) {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(8)).batch_size(batch_size), "*").unwrap();
    let rates = Rc::new(RefCell::default());
    graph.add("net", optimizer(Recorded(Sgd::new(0.5), Rc::clone(&rates))), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "train").unwrap();
    (graph, rates)
}

fn linear() -> ModuleNode<nn::Linear, Tensor> {
    ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 1, Default::default()),
        |net: &nn::Linear, x| Ok(x.tensor("x")?.apply(net)),
    )
}

#[test]
fn schedules_by_epoch_and_over_the_run_do_not_depend_on_the_steps_of_an_epoch() {
    let rates = |ranks: usize, schedule: fn() -> Schedule| {
        let mut rates = on_ranks(ranks, |_| {
            let (graph, rates) = recorded(2, |sgd| linear().optimizer(sgd.schedule(schedule())));
            let tasks = Repeat::new(2).then(Task::train("train").epochs(2));
            (graph, tasks, Box::new(move || rates.take()) as Box<_>)
        });
        let first: Vec<f64> = rates.remove(0);
        assert!(rates.iter().all(|other| *other == first));
        first
    };
    for (ranks, steps) in [(1, 16_u32), (2, 8)] {
        let falls = rates(ranks, || Schedule::linear(1.0, 0.0, 100).over_run(100));
        let expected: Vec<f64> =
            (0..steps).map(|step| 0.5 * (1.0 - f64::from(step) / f64::from(steps))).collect();
        assert_eq!(falls.len(), expected.len());
        assert!(falls.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12), "{falls:?}");
        let drops = rates(ranks, || Schedule::milestones([1, 3], 0.5).by_epoch());
        let of_epoch = [0.5, 0.25, 0.25, 0.125];
        let expected: Vec<f64> = (0..steps).map(|step| of_epoch[(step * 4 / steps) as usize]).collect();
        assert_eq!(drops, expected, "{ranks} ranks");
    }
}

#[test]
fn schedule_over_a_run_of_steps_is_that_of_the_steps_and_needs_one_unit() {
    let run = |schedule: Schedule, more: Option<Task>| {
        let _turn = turn();
        let (graph, rates) = recorded(2, |sgd| linear().optimizer(sgd.schedule(schedule)));
        let tasks = Repeat::new(3).then(Task::train("train").steps(7));
        let tasks = Repeat::once().then(more.into_iter().fold(tasks, Repeat::then));
        let out = tempfile::tempdir().unwrap();
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        let outcome = Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config);
        outcome.map(|()| rates.take())
    };
    let cosine = || Schedule::linear_warmup(5).then(5, Schedule::cosine(16, 0.1));
    assert_eq!(run(cosine().over_run(21), None).unwrap(), run(cosine(), None).unwrap());
    let error = run(cosine().over_run(21), Some(Task::train("train"))).unwrap_err().to_string();
    assert!(error.contains("all training tasks a number of epochs"), "{error}");
}

/// Returns the learning rates of a run of `turns` turns, from the start or from the last
/// checkpoint.
fn rates_on_plateau(out: &std::path::Path, turns: u64, from: Option<ResumeFrom>) -> Vec<f64> {
    const LOSSES: [f64; 8] = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0];
    let _turn = turn();
    let (mut graph, rates) = recorded(2, |sgd| {
        let half = Schedule::lambda(|step| if step % 2 == 0 { 1.0 } else { 0.5 });
        linear().optimizer_for("bias", Sgd::new(0.1)).optimizer(sgd.schedule(half))
    });
    // There are more samples than steps, so that no epoch ends.
    graph.add("x", DatasetNode::new(Line(40)).batch_size(2), "train").unwrap();
    let measured = MetricNode::last(|x| Ok(Tensor::from_slice(&[LOSSES[x.train_steps() as usize - 1]])));
    graph.add("measured", measured, "val").unwrap();
    let plateau = ReduceLROnPlateau::new("val/measured", Better::Lower).patience(1).factor(0.1).of("*/net");
    let tasks = Repeat::new(turns)
        .then(Task::train("train").steps(1))
        .then(Task::eval("val").steps(1).simulate_epoch())
        .then(plateau)
        .then(SaveCheckpoint::new());
    let config = RunConfig {
        seed: 7,
        out_dir: out.to_owned(),
        resume_from: from,
        log_every: None,
        ..RunConfig::default()
    };
    Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
    rates.take()
}

#[test]
fn plateau_reduces_what_a_schedule_multiplies_and_a_resumed_run_goes_on_with_it() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let undisturbed = rates_on_plateau(whole.path(), 8, None);
    let reduced = 0.5 * 0.1;
    let twice = reduced * 0.1;
    let expected = [0.5, 0.25, 0.5, 0.25, reduced, reduced * 0.5, reduced, twice * 0.5];
    assert_eq!(undisturbed, expected);
    for turns in [3, 4, 6] {
        let parts = parts.path().join(turns.to_string());
        let mut rates = rates_on_plateau(&parts, turns, None);
        rates.extend(rates_on_plateau(&parts, 8, Some(ResumeFrom::Latest)));
        assert_eq!(rates, expected, "resumed after turn {turns}");
    }
}
