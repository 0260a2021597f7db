use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use ice_worker::Worker;
use tch::{Device, Tensor};

use crate::graph::{ExecutableGraph, StepPlace};
use crate::run::Leave;
use crate::{BatchShare, Error, Result, Value};

/// The outputs of the nodes in one iteration, computed on first access.
///
/// A node's closure receives this and asks for outputs by name. The named node runs on the first
/// request, once per iteration.
pub struct Outputs<'a> {
    graph: &'a ExecutableGraph,
    worker: &'a Worker,
    train: bool,
    values: RefCell<Vec<Option<Made>>>,
    /// Inputs under names that no node has.
    inputs: Vec<(String, Value)>,
    running: RefCell<Vec<Running>>,
    /// Number of datasets that have run.
    datasets: Cell<u32>,
    /// Position of the first dataset that has run, and the distribution of its samples over the
    /// ranks.
    first_share: Cell<Option<(usize, BatchShare)>>,
}

/// The output of a node, and the datasets behind it.
struct Made {
    value: Value,
    /// Datasets that the output depends on, as a bit set.
    sources: u64,
    /// For a dataset: its bit, and the distribution of its samples over the ranks.
    share: Option<(u64, BatchShare)>,
}

/// A node that is running, and what is known about its output so far.
struct Running {
    index: usize,
    sources: u64,
    share: Option<(u64, BatchShare)>,
}

impl<'a> Outputs<'a> {
    pub(crate) fn new(graph: &'a ExecutableGraph, worker: &'a Worker, train: bool) -> Self {
        let values = RefCell::new((0..graph.entries().len()).map(|_| None).collect());
        let (inputs, running, datasets, first_share) = Default::default();
        Self { graph, worker, train, values, inputs, running, datasets, first_share }
    }

    /// Adds values by name. Nodes of these names do not run.
    pub(crate) fn with_inputs(mut self, inputs: &[(String, Value)]) -> Self {
        for (name, value) in inputs {
            match self.graph.position(name) {
                Some(index) => {
                    let made = Made { value: value.clone(), sources: 0, share: None };
                    self.values.get_mut()[index] = Some(made);
                }
                None => self.inputs.push((name.clone(), value.clone())),
            }
        }
        self
    }

    /// Returns the output of the node `name`, if it has the type `T`.
    ///
    /// # Errors
    /// No such node in this task, an output of another type, a cycle, or the failure of the node
    /// itself.
    pub fn get<T: 'static>(&self, name: &str) -> Result<Rc<T>> {
        self.value(name)?.downcast::<T>().map_err(|made| {
            let uid = self.graph.position(name).map_or(name, |index| self.uid(index));
            Error::Graph(format!("node `{uid}` makes `{made}`, not `{}`", std::any::type_name::<T>()))
        })
    }

    /// Returns the output of the node `name`, of any type.
    pub(crate) fn value(&self, name: &str) -> Result<Value> {
        let Some(index) = self.graph.position(name) else {
            if let Some((_, value)) = self.inputs.iter().find(|(input, _)| input == name) {
                return Ok(value.clone());
            }
            let there: Vec<_> = self.graph.entries().iter().map(|entry| format!("`{}`", entry.uid)).collect();
            return Err(Error::Graph(format!(
                "no node `{name}` in this task; there are {}",
                there.join(", ")
            )));
        };
        self.run(index)?;
        let values = self.values.borrow();
        let made = values[index].as_ref();
        let made = made.ok_or_else(|| Error::Graph(format!("node `{name}` made no output")))?;
        if let Some(asking) = self.running.borrow_mut().last_mut() {
            asking.sources |= made.sources;
        }
        Ok(made.value.clone())
    }

    /// Returns the progress of the run at the start of this step.
    pub(crate) fn place(&self) -> StepPlace {
        self.graph.place()
    }

    /// Returns the number of completed training steps of the run, in all tasks. In a training step
    /// this is the number of the step, from 0. Custom schedules should depend on it, since a
    /// resumed run continues with it. 0 in a graph that is run by hand.
    pub fn train_steps(&self) -> u64 {
        self.place().train_steps
    }

    /// Returns the number of completed epochs of the run: of training in a training step, of
    /// evaluation in an evaluation.
    pub fn epoch(&self) -> u64 {
        self.place().epochs
    }

    /// Returns the number of iterations of the epoch completed before this step.
    pub fn iteration(&self) -> u64 {
        self.place().iteration
    }

    /// Returns the number of iterations of the epoch, or `None` if no node has a size.
    pub fn epoch_iterations(&self) -> Option<u64> {
        self.place().epoch_iterations
    }

    /// Returns the folder of the run, in which nodes may write, or `None` in a graph that is run by
    /// hand.
    pub fn folder(&self) -> Option<&Path> {
        self.graph.folder()
    }

    /// Returns the identifier of the job.
    pub fn run_id(&self) -> &str {
        self.worker.run_id()
    }

    /// Shows a custom value in TensorBoard, at the number of training steps completed after this
    /// one. Only rank 0 writes; other ranks may call it or not. A tag has one value per step: the
    /// last one. A step that is repeated because a rank was lost shows it once.
    pub fn show_scalar(&self, tag: &str, value: f64) {
        self.graph.show_scalar(tag, value);
    }

    /// Returns the output of the node `name` as a tensor that shares its storage.
    ///
    /// # Errors
    /// The errors of [`Outputs::get`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.get::<Tensor>(name)?.shallow_clone())
    }

    /// Leaves the task early, on all ranks. If one rank asks for it, all ranks leave after this
    /// step, or after the next one if another rank has already begun it. Measures of an unfinished
    /// epoch do not count, and an evaluation returns to the start of the epoch.
    pub fn stop_task(&self) {
        self.graph.ask_to_leave(Leave::Task);
    }

    /// Ends the run successfully, at the same place as [`Outputs::stop_task`].
    pub fn stop_all_tasks(&self) {
        self.graph.ask_to_leave(Leave::Run);
    }

    /// Whether gradients are computed: dropout is active, statistics are updated.
    pub fn is_training(&self) -> bool {
        self.train
    }

    /// Returns the device that inputs must be on.
    pub fn device(&self) -> Device {
        self.worker.device()
    }

    pub(crate) fn worker(&self) -> &Worker {
        self.worker
    }

    /// Returns the distribution of this iteration's samples over the ranks. The samples are those
    /// of the datasets that the running node has asked for so far, directly or through other nodes.
    /// Without a dataset, each rank counts as one sample.
    ///
    /// # Errors
    /// [`Error::Graph`] if several datasets are distributed in different ways, which happens in the
    /// last batches of an epoch. The message names them.
    pub fn share(&self) -> Result<BatchShare> {
        Ok(self.dataset_of_running()?.map_or(self.without_dataset(), |(_, share)| share))
    }

    /// Returns the distribution for a node that depends on no dataset.
    fn without_dataset(&self) -> BatchShare {
        BatchShare { here: 1, total: self.worker.world_size() as u64 }
    }

    /// Like [`Outputs::share`], with the position of a dataset that has this distribution. `None`
    /// without a dataset.
    fn dataset_of_running(&self) -> Result<Option<(usize, BatchShare)>> {
        let sources = self.running.borrow().last().map_or(u64::MAX, |running| running.sources);
        if let (1, Some(first)) = (self.datasets.get(), self.first_share.get())
            && sources != 0
        {
            return Ok(Some(first));
        }
        let values = self.values.borrow();
        let mut shares = values.iter().enumerate().filter_map(|(index, made)| {
            let (bit, share) = made.as_ref()?.share?;
            (sources & bit != 0).then_some((index, share))
        });
        let Some((first, share)) = shares.next() else { return Ok(None) };
        match shares.find(|(_, other)| !share.is_spread_like(other)) {
            None => Ok(Some((first, share))),
            Some((other, _)) => Err(Error::Graph(format!(
                "this depends on the datasets `{}` and `{}`, whose samples are spread over the ranks in different ways in this step: \
                 say which ones count, by `.samples_of(\"{}\")`, or leave out their last samples by `.drop_last(true)`",
                self.uid(first),
                self.uid(other),
                self.graph.entries()[first].name,
            ))),
        }
    }

    /// Returns the distribution of the samples of the dataset `name` over the ranks in this
    /// iteration.
    ///
    /// # Errors
    /// [`Error::Graph`] if that node is not a dataset, and the errors of [`Outputs::get`].
    pub fn share_of(&self, name: &str) -> Result<BatchShare> {
        Ok(self.dataset(name)?.1)
    }

    /// Returns the position of the dataset `name`, and the distribution of its samples.
    fn dataset(&self, name: &str) -> Result<(usize, BatchShare)> {
        self.value(name)?;
        let made = |index: usize| Some((index, self.values.borrow()[index].as_ref()?.share?.1));
        let dataset = self.graph.position(name).and_then(made);
        dataset.ok_or_else(|| Error::Graph(format!("node `{name}` is not a dataset")))
    }

    /// Returns the distribution of the samples that a node counts: those of the dataset
    /// `samples_of`, or of the datasets that the node depends on.
    pub(crate) fn share_for(&self, samples_of: Option<&str>) -> Result<BatchShare> {
        samples_of.map_or_else(|| self.share(), |name| self.share_of(name))
    }

    /// Like [`Outputs::share_for`], with the factor of a loss over these samples. The passes of a
    /// step are weighted by the samples of the first dataset. The factor corrects a loss over
    /// another dataset, so that each of its samples has the same weight in the step, too.
    pub(crate) fn share_of_loss(&self, samples_of: Option<&str>) -> Result<(BatchShare, f64)> {
        let dataset =
            samples_of.map_or_else(|| self.dataset_of_running(), |name| self.dataset(name).map(Some))?;
        let Some((own, share)) = dataset else { return Ok((self.without_dataset(), 1.0)) };
        let others = self.first_share.get().filter(|(first, _)| *first != own);
        let correction = others.and_then(|(first, of_first)| {
            let [in_step, in_step_of_first] = self.graph.step_samples([own, first])?;
            let part = u128::from(share.total) * u128::from(in_step_of_first);
            let part_of_first = u128::from(of_first.total) * u128::from(in_step);
            (part != part_of_first).then_some(part as f64 / part_of_first as f64)
        });
        Ok((share, correction.unwrap_or(1.0)))
    }

    /// Sets the distribution of the samples of the running node, which is a dataset.
    pub(crate) fn set_share(&self, share: BatchShare) -> Result<()> {
        let number = self.datasets.get();
        let bit = 1_u64.checked_shl(number);
        let bit = bit.ok_or_else(|| Error::Graph("a task has more than 64 datasets".into()))?;
        self.datasets.set(number + 1);
        if let Some(running) = self.running.borrow_mut().last_mut() {
            (running.sources, running.share) = (running.sources | bit, Some((bit, share)));
            if number == 0 {
                self.first_share.set(Some((running.index, share)));
            }
        }
        Ok(())
    }

    pub(crate) fn samples(&self) -> u64 {
        self.first_share.get().map_or(0, |(_, share)| share.total)
    }

    pub(crate) fn run_all(&self) -> Result<()> {
        (0..self.graph.entries().len()).try_for_each(|index| self.run(index))
    }

    fn run(&self, index: usize) -> Result<()> {
        if self.values.borrow()[index].is_some() {
            return Ok(());
        }
        let entry = &self.graph.entries()[index];
        if let Some(start) = self.running.borrow().iter().position(|running| running.index == index) {
            let running = self.running.borrow();
            let mut path: Vec<_> = running[start..].iter().map(|running| running.index).collect();
            path.push(index);
            let path: Vec<_> = path.into_iter().map(|index| self.uid(index)).collect();
            return Err(Error::Graph(format!("the nodes wait for each other: {}", path.join(" → "))));
        }
        self.running.borrow_mut().push(Running { index, sources: 0, share: None });
        let forward = || entry.node.borrow_mut().forward(self);
        let value = self
            .graph
            .timed(&entry.uid, "forward", forward)
            .map_err(|error| error.at(&entry.uid, "forward"))?;
        let (sources, share) =
            self.running.borrow_mut().pop().map_or((0, None), |running| (running.sources, running.share));
        self.values.borrow_mut()[index] = Some(Made { value, sources, share });
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
