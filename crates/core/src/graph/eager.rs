use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use ice_worker::Worker;
use tch::Device;

use crate::graph::{ExecutableGraph, Outputs};
use crate::{Context, HyperGraph, InitFrom, Result, Round, Tags, Value};

/// A graph that is run by hand in this process only: for tests of single nodes, and to use a
/// trained model.
///
/// ```
/// use ice_core::{Context, HyperGraph, Node, Outputs, Result, Value};
/// use tch::Device;
///
/// struct Seven;
/// impl Node for Seven {
///     fn set_up(&mut self, _: &Context) -> Result<()> {
///         Ok(())
///     }
///     fn forward(&mut self, _: &Outputs) -> Result<Value> {
///         Ok(Value::new(7))
///     }
/// }
///
/// let mut graph = HyperGraph::new();
/// graph.add("seven", Seven, "*")?;
/// let eager = graph.eager(Device::Cpu, 0)?;
/// assert_eq!(eager.forward("*", |x| Ok(*x.get::<i32>("seven")?))?, 7);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct Eager<'a> {
    graph: &'a HyperGraph,
    worker: Rc<Worker>,
    inputs: RefCell<Vec<(String, Value)>>,
}

impl HyperGraph {
    /// Sets up all nodes in this process, without a launcher.
    ///
    /// # Errors
    /// The failure of a node's set-up.
    pub fn eager(&self, device: Device, seed: u64) -> Result<Eager<'_>> {
        let worker = Rc::new(Worker::alone(device));
        self.set_up(&Context::new(Rc::clone(&worker), seed))?;
        self.enter_round(&Round {
            worker: Rc::clone(&worker),
            batch_ranks: 1,
            lr_factor: 1.0,
            is_fresh: true,
        })?;
        Ok(Eager { graph: self, worker, inputs: RefCell::default() })
    }
}

impl Eager<'_> {
    /// Loads a trained state into the nodes of this graph: the parameters and buffers of a run, of
    /// a checkpoint, or of safetensors files from other programs. From a run's folder, loads its
    /// newest valid checkpoint; from the folder `best` in it, the best one. Other nodes with a
    /// state get it, too, unless it is a position in data or a measure. Optimizers stay as they
    /// are.
    ///
    /// ```no_run
    /// use ice_core::HyperGraph;
    /// use tch::{Device, Tensor};
    ///
    /// # fn predict(graph: HyperGraph, images: Tensor) -> ice_core::Result<Tensor> {
    /// let eager = graph.eager(Device::Cpu, 0)?;
    /// eager.load("out/digits_20260131-120000/best")?;
    /// eager.set_input("images", images);
    /// eager.forward("*", |x| x.tensor("net"))
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) if parameters of the graph are missing or have another
    /// shape, or if its nodes have no parameter for a key. The message names all of them, and
    /// nothing is loaded. Nodes of the files that the graph does not have are ignored.
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) if there is nothing to load, or it is
    /// damaged.
    pub fn load(&self, from: impl Into<InitFrom>) -> Result<()> {
        from.into().load_trained(self.graph, &self.worker)
    }

    /// Sets an output by name. In [`Eager::forward`] a node of that name does not run, and need not
    /// exist. The value stays until it is set again.
    pub fn set_input<T: 'static>(&self, name: &str, value: T) {
        let mut inputs = self.inputs.borrow_mut();
        inputs.retain(|(known, _)| known != name);
        inputs.push((name.to_owned(), Value::new(value)));
    }

    /// Begins an iteration of the nodes that a query selects, without gradients. Only the nodes
    /// whose outputs `look` asks for run.
    ///
    /// # Errors
    /// The query selects no nodes, or a node fails.
    pub fn forward<T>(
        &self,
        query: impl Into<Tags>,
        look: impl FnOnce(&Outputs<'_>) -> Result<T>,
    ) -> Result<T> {
        let graph = self.begin(query)?;
        tch::no_grad(|| graph.forward(&self.worker, &self.inputs.borrow(), look))
    }

    /// Evaluates the nodes that a query selects, and returns their measures by uid. The evaluation
    /// covers the rest of the current epoch of their data, or one iteration if no node has a size.
    ///
    /// # Errors
    /// The query selects no nodes, or a node fails.
    pub fn evaluate(&self, query: impl Into<Tags>) -> Result<BTreeMap<String, f64>> {
        let graph = self.begin(query)?;
        // Measures keep the sums of the previous epoch until now.
        graph.epoch_start();
        loop {
            graph.eval_step(&self.worker)?;
            if graph.remaining().is_none_or(|left| left == 0) {
                break;
            }
        }
        let measures = graph.epoch_end(&self.worker, |_| true)?;
        Ok(measures.iter().flat_map(|(uid, measure)| measure.named(uid)).collect())
    }

    /// Executes one training step of the nodes that a query selects, and returns its loss.
    ///
    /// # Errors
    /// The query selects no nodes or no loss, or a node fails.
    pub fn train_step(&self, query: impl Into<Tags>) -> Result<f64> {
        let graph = self.begin(query)?;
        let step = graph.train_step(&self.worker, false)?;
        Ok(step.map_or(Ok(f64::NAN), |step| step.loss.f_double_value(&[]))?)
    }

    /// Selects and prepares the nodes. If their epoch is used up, starts the next one.
    fn begin(&self, query: impl Into<Tags>) -> Result<Rc<ExecutableGraph>> {
        let graph = self.graph.select(&query.into())?;
        self.graph.switch_to(graph.entries())?;
        if graph.remaining() == Some(0) {
            graph.epoch_end(&self.worker, |_| true)?;
            graph.epoch_start();
        }
        Ok(graph)
    }
}
