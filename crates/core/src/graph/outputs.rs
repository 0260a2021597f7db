use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ice_worker::Worker;
use tch::{Device, Tensor};

use crate::graph::ExecutableGraph;
use crate::run::Leave;
use crate::{Error, Result, Share, Value};

/// The outputs of the nodes in one iteration, made when they are first asked for.
///
/// A node's closure gets this and asks for what it needs by name; the named node runs then, once per iteration.
pub struct Outputs<'a> {
    graph: &'a ExecutableGraph,
    worker: &'a Worker,
    train: bool,
    values: RefCell<Vec<Option<Value>>>,
    running: RefCell<Vec<usize>>,
    share: Cell<Option<Share>>,
}

impl<'a> Outputs<'a> {
    pub(crate) fn new(graph: &'a ExecutableGraph, worker: &'a Worker, train: bool) -> Self {
        let values = RefCell::new((0..graph.entries().len()).map(|_| None).collect());
        Self { graph, worker, train, values, running: RefCell::default(), share: Cell::default() }
    }

    /// The output of the node `name`, as the type that the node makes.
    ///
    /// # Errors
    /// No such node in this task, another type than the node makes, a cycle, or the failure of the node itself.
    pub fn get<T: 'static>(&self, name: &str) -> Result<Rc<T>> {
        self.value(name)?.downcast::<T>().map_err(|made| {
            let uid = self.graph.position(name).map_or(name, |index| self.uid(index));
            Error::Graph(format!("node `{uid}` makes `{made}`, not `{}`", std::any::type_name::<T>()))
        })
    }

    /// The output of the node `name`, of whatever type.
    pub(crate) fn value(&self, name: &str) -> Result<Value> {
        let index = self.graph.position(name).ok_or_else(|| {
            let there: Vec<_> = self.graph.entries().iter().map(|entry| format!("`{}`", entry.uid)).collect();
            Error::Graph(format!("no node `{name}` in this task; there are {}", there.join(", ")))
        })?;
        self.run(index)?;
        let values = self.values.borrow();
        values[index].clone().ok_or_else(|| Error::Graph(format!("node `{name}` made no output")))
    }

    /// Training epochs and steps that were done before this step.
    pub(crate) fn place(&self) -> (u64, u64) {
        self.graph.place()
    }

    /// The output of the node `name` as a tensor that shares its storage.
    ///
    /// # Errors
    /// As [`Outputs::get`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.get::<Tensor>(name)?.shallow_clone())
    }

    /// Leaves the task before its end: all ranks do, once this step, or the next one where another rank has begun it, is done. It is enough that
    /// one rank asks for it. What was measured in an epoch that is left does not count, and an evaluation goes back to the start of the epoch.
    pub fn stop_task(&self) {
        self.graph.ask_to_leave(Leave::Task);
    }

    /// Ends the run, which counts as well done, at the same place as [`Outputs::stop_task`].
    pub fn stop_all_tasks(&self) {
        self.graph.ask_to_leave(Leave::Run);
    }

    /// Whether gradients are wanted: dropout is active, statistics are updated.
    pub fn is_training(&self) -> bool {
        self.train
    }

    /// The device that inputs belong on.
    pub fn device(&self) -> Device {
        self.worker.device()
    }

    pub(crate) fn worker(&self) -> &Worker {
        self.worker
    }

    /// How the samples of this iteration are spread over the ranks. The first dataset to run says so.
    pub fn share(&self) -> Share {
        self.share.get().unwrap_or_default()
    }

    pub(crate) fn set_share(&self, share: Share) {
        if self.share.get().is_none() {
            self.share.set(Some(share));
        }
    }

    pub(crate) fn samples(&self) -> u64 {
        self.share.get().map_or(0, |share| share.total)
    }

    pub(crate) fn run_all(&self) -> Result<()> {
        (0..self.graph.entries().len()).try_for_each(|index| self.run(index))
    }

    fn run(&self, index: usize) -> Result<()> {
        if self.values.borrow()[index].is_some() {
            return Ok(());
        }
        let entry = &self.graph.entries()[index];
        if let Some(start) = self.running.borrow().iter().position(|&running| running == index) {
            let running = self.running.borrow();
            let path: Vec<_> = running[start..].iter().chain([&index]).map(|&i| self.uid(i)).collect();
            return Err(Error::Graph(format!("the nodes wait for each other: {}", path.join(" → "))));
        }
        self.running.borrow_mut().push(index);
        let forward = || entry.node.borrow_mut().forward(self);
        let value = self
            .graph
            .timed(&entry.uid, "forward", forward)
            .map_err(|error| error.at(&entry.uid, "forward"))?;
        self.running.borrow_mut().pop();
        self.values.borrow_mut()[index] = Some(value);
        Ok(())
    }

    fn uid(&self, index: usize) -> &str {
        &self.graph.entries()[index].uid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Context, HyperGraph, Node};

    struct Sum {
        of: Vec<&'static str>,
        plus: i64,
        runs: Rc<Cell<u32>>,
    }

    impl Node for Sum {
        fn set_up(&mut self, _: &Context) -> Result<()> {
            Ok(())
        }

        fn forward(&mut self, x: &Outputs) -> Result<Value> {
            self.runs.set(self.runs.get() + 1);
            let mut sum = self.plus;
            for name in &self.of {
                sum += *x.get::<i64>(name)?;
            }
            Ok(Value::new(sum))
        }
    }

    fn graph(nodes: &[(&str, &[&'static str], i64)]) -> (HyperGraph, Rc<Cell<u32>>) {
        let runs = Rc::new(Cell::new(0));
        let mut graph = HyperGraph::new();
        for (name, of, plus) in nodes {
            graph.add(name, Sum { of: of.to_vec(), plus: *plus, runs: Rc::clone(&runs) }, "*").unwrap();
        }
        (graph, runs)
    }

    fn check<T>(graph: &HyperGraph, test: impl FnOnce(&Outputs) -> T) -> T {
        let executable = graph.select(&"*".into()).unwrap();
        let worker = Worker::alone(Device::Cpu);
        test(&Outputs::new(&executable, &worker, false))
    }

    #[test]
    fn each_node_runs_once_however_often_it_is_asked_for() {
        let (graph, runs) = graph(&[("c", &["a", "b", "a"], 0), ("b", &["a"], 10), ("a", &[], 1)]);
        check(&graph, |x| {
            x.run_all().unwrap();
            assert_eq!(*x.get::<i64>("c").unwrap(), 1 + 11 + 1);
        });
        assert_eq!(runs.get(), 3);
    }

    #[test]
    fn a_cycle_is_named_by_its_path() {
        let (graph, _) = graph(&[("a", &["b"], 0), ("b", &["c"], 0), ("c", &["b"], 0)]);
        let message = check(&graph, |x| x.run_all().unwrap_err().to_string());
        assert!(message.contains("*/b → */c → */b"), "{message}");
    }

    #[test]
    fn wrong_names_and_types_say_what_there_is() {
        let (graph, _) = graph(&[("a", &[], 1)]);
        check(&graph, |x| {
            let message = x.get::<i64>("z").unwrap_err().to_string();
            assert!(message.contains("`*/a`"), "{message}");
            let message = x.tensor("a").unwrap_err().to_string();
            assert!(message.contains("`i64`") && message.contains("Tensor"), "{message}");
        });
    }
}
