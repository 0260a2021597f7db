use std::rc::Rc;

use ice_worker::Worker;
use tch::Device;

use crate::graph::{ExecutableGraph, Outputs};
use crate::{Context, HyperGraph, Result, Round, Tags};

/// A graph that is run by hand, in this process alone: for tests of single nodes, and for using what was trained.
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
}

impl HyperGraph {
    /// Makes all nodes ready in this process, without launching anything.
    ///
    /// # Errors
    /// Whatever keeps a node from being ready.
    pub fn eager(&self, device: Device, seed: u64) -> Result<Eager<'_>> {
        let worker = Rc::new(Worker::alone(device));
        self.set_up(&Context { worker: Rc::clone(&worker), seed })?;
        self.enter_round(&Round {
            worker: Rc::clone(&worker),
            batch_ranks: 1,
            lr_factor: 1.0,
            is_fresh: true,
        })?;
        Ok(Eager { graph: self, worker })
    }
}

impl Eager<'_> {
    /// Begins an iteration of the nodes that a query selects, without gradients; those run that are asked for.
    ///
    /// # Errors
    /// The query selects no nodes, or a node fails.
    pub fn forward<T>(
        &self,
        query: impl Into<Tags>,
        look: impl FnOnce(&Outputs<'_>) -> Result<T>,
    ) -> Result<T> {
        let graph = self.begin(query)?;
        tch::no_grad(|| graph.forward(&self.worker, look))
    }

    /// Does one training step of the nodes that a query selects, and returns its loss.
    ///
    /// # Errors
    /// The query selects no nodes or no loss, or a node fails.
    pub fn train_step(&self, query: impl Into<Tags>) -> Result<f64> {
        let graph = self.begin(query)?;
        let step = graph.train_step(&self.worker, false)?;
        Ok(step.map_or(Ok(f64::NAN), |step| step.loss.f_double_value(&[]))?)
    }

    /// After the last batch of an epoch comes the first one of the next.
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
