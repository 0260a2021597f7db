use std::rc::Rc;

use ice_worker::Worker;
use tch::Tensor;

use crate::graph::Outputs;
use crate::graph::hyper::Entry;
use crate::{Error, Measure, Result};

/// The nodes that one task runs.
pub(crate) struct ExecutableGraph {
    entries: Vec<Rc<Entry>>,
}

impl ExecutableGraph {
    pub(super) fn new(entries: Vec<Rc<Entry>>) -> Self {
        Self { entries }
    }

    pub(crate) fn entries(&self) -> &[Rc<Entry>] {
        &self.entries
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Iterations left in the epoch: those of the node that runs out first; `None` where no node has a size.
    pub(crate) fn remaining(&self) -> Option<u64> {
        self.entries.iter().filter_map(|entry| entry.node.borrow().remaining()).min()
    }

    pub(crate) fn epoch_start(&self) {
        for entry in &self.entries {
            entry.node.borrow_mut().epoch_start();
        }
    }

    /// Ends the epoch on every node and collects what they measured, by uid, synchronised over the ranks.
    pub(crate) fn epoch_end(&self, worker: &Worker) -> Result<Vec<(String, Measure)>> {
        let mut measures = Vec::new();
        for entry in &self.entries {
            let measure = entry
                .node
                .borrow_mut()
                .epoch_end(worker)
                .map_err(|error| error.at(&entry.uid, "epoch end"))?;
            measures.extend(measure.map(|measure| (entry.uid.clone(), measure)));
        }
        Ok(measures)
    }

    /// Runs every node once, without gradients.
    pub(crate) fn eval_step(&self, worker: &Worker) -> Result<u64> {
        tch::no_grad(|| {
            let outputs = Outputs::new(self, worker, false);
            outputs.run_all()?;
            self.iteration_end();
            Ok(outputs.samples())
        })
    }

    /// Runs every node once, goes back from the sum of the losses, and applies the optimizers. Returns the samples of all
    /// ranks and this rank's loss.
    pub(crate) fn train_step(&self, worker: &Worker) -> Result<(u64, Tensor)> {
        for entry in &self.entries {
            entry.node.borrow_mut().before_step().map_err(|error| error.at(&entry.uid, "before the step"))?;
        }
        let outputs = Outputs::new(self, worker, true);
        outputs.run_all()?;
        let loss = self
            .entries
            .iter()
            .filter_map(|entry| entry.node.borrow_mut().take_loss())
            .reduce(|sum, loss| sum + loss)
            .ok_or_else(|| {
                Error::Graph("a training task selects no loss node: add one or use Task::eval".into())
            })?;
        for entry in &self.entries {
            entry
                .node
                .borrow_mut()
                .before_backward(&loss)
                .map_err(|error| error.at(&entry.uid, "backward"))?;
        }
        // From here on this rank waits for the others; one that did not come so far is behind.
        worker.link().tick();
        ice_c10d::run_backward(&loss)?;
        for entry in &self.entries {
            entry.node.borrow_mut().update().map_err(|error| error.at(&entry.uid, "update"))?;
        }
        self.iteration_end();
        Ok((outputs.samples(), loss.detach()))
    }

    fn iteration_end(&self) {
        for entry in &self.entries {
            entry.node.borrow_mut().iteration_end();
        }
    }
}
