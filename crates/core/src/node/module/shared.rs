//! A module that several nodes use.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ice_worker::Worker;
use tch::Tensor;

use super::Forward;
use super::buffers::Buffers;
use super::over_ranks::over_ranks;
use crate::{Context, Error, Node, Outputs, Result, Value};

/// The parts of a module that its owner shares with other nodes.
pub(super) struct Slot<M> {
    pub(super) parts: RefCell<Option<Parts<M>>>,
    /// Whether the current step trains the module.
    pub(super) is_trained: Cell<bool>,
}

pub(super) struct Parts<M> {
    pub(super) module: Rc<M>,
    pub(super) trainable: Vec<Tensor>,
    pub(super) buffers: Rc<Buffers>,
    pub(super) broadcast_buffers: bool,
    pub(super) sync_batch_norm: bool,
}

impl<M> Default for Slot<M> {
    fn default() -> Self {
        Self { parts: RefCell::default(), is_trained: Cell::default() }
    }
}

/// Another use of the module of a [`ModuleNode`](crate::ModuleNode), created by
/// [`ModuleNode::share`](crate::ModuleNode::share).
pub struct SharedNode<M, T> {
    slot: Rc<Slot<M>>,
    forward: Box<Forward<M, T>>,
    worker: Option<Rc<Worker>>,
    /// The buffers at the start of the step, if the step may have to be repeated.
    before: Vec<Tensor>,
    in_step: bool,
}

impl<M: 'static, T: 'static> SharedNode<M, T> {
    pub(super) fn new(slot: Rc<Slot<M>>, forward: Box<Forward<M, T>>) -> Self {
        Self { slot, forward, worker: None, before: Vec::new(), in_step: false }
    }

    /// Returns the buffers if this node is responsible for them in this step, since their owner
    /// does not train.
    fn own_buffers(&self) -> Option<Rc<Buffers>> {
        let parts = self.slot.parts.borrow();
        Some(Rc::clone(&parts.as_ref().filter(|_| !self.slot.is_trained.get())?.buffers))
    }
}

impl<M: 'static, T: 'static> Node for SharedNode<M, T> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        self.worker = Some(Rc::clone(&context.worker));
        Ok(())
    }

    fn before_step(&mut self) -> Result<()> {
        self.in_step = true;
        if self.worker.as_ref().is_some_and(|worker| worker.can_stay()) {
            self.before = self.own_buffers().map_or(Vec::new(), |buffers| buffers.copies());
        }
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let parts = self.slot.parts.borrow();
        let parts = parts.as_ref().ok_or_else(|| {
            Error::Graph(
                "this shares the module of a node that is not in the graph: add that node, too".into(),
            )
        })?;
        let is_constant = x.is_training() && !self.slot.is_trained.get();
        let require = |require: bool| {
            for parameter in parts.trainable.iter().filter(|_| is_constant) {
                let _ = parameter.set_requires_grad(require);
            }
        };
        // libtorch's autograd graph records at each operation which of its inputs require
        // gradients. To switch the flag off during forward is therefore enough to make the
        // parameters constants.
        require(false);
        let forward = || (self.forward)(&parts.module, x);
        let output = match &self.worker {
            Some(worker) => over_ranks(worker, x, parts.sync_batch_norm, forward),
            None => forward(),
        };
        require(true);
        Ok(Value::new(output?))
    }

    fn after_backward(&mut self, _: bool) -> Result<()> {
        let broadcasts = self.slot.parts.borrow().as_ref().is_some_and(|parts| parts.broadcast_buffers);
        let Some(worker) = self.worker.as_ref().filter(|_| broadcasts) else { return Ok(()) };
        self.own_buffers().map_or(Ok(()), |buffers| buffers.broadcast(worker))
    }

    fn collect_gradients(&mut self, _: f64, last: bool, _: bool) -> Result<()> {
        // The owner collects the gradients; only the buffers remain.
        self.after_backward(last)
    }

    fn step_end(&mut self) -> Result<()> {
        self.in_step = false;
        Ok(())
    }

    fn roll_back(&mut self) {
        let in_step = std::mem::take(&mut self.in_step);
        if let Some(buffers) = self.own_buffers().filter(|_| in_step) {
            buffers.restore(&self.before);
        }
    }
}
