//! The ranks that run a module together, for its batch norms.

use std::cell::RefCell;
use std::rc::Rc;

use ice_c10d::ProcessGroup;
use ice_worker::Worker;
use tch::Tensor;

use crate::{Error, Outputs, Result};

struct Ranks {
    worker: Rc<Worker>,
    group: ProcessGroup,
    failure: RefCell<Option<Error>>,
}

impl ice_nn::Ranks for Ranks {
    fn group(&self) -> &ProcessGroup {
        &self.group
    }

    fn gather(&self, own: &Tensor) -> Option<Vec<Tensor>> {
        if self.failure.borrow().is_some() {
            return None;
        }
        let all: Vec<_> = (0..self.group.world_size()).map(|_| own.empty_like()).collect();
        match self.worker.all_gather(&all, own) {
            Ok(()) => Some(all),
            Err(error) => {
                self.failure.replace(Some(error.into()));
                None
            }
        }
    }

    fn fail(&self, error: ice_c10d::Error) {
        self.failure.borrow_mut().get_or_insert(error.into());
    }
}

/// Runs a forward pass. In a training step, batch norms use the ranks of the round: synchronized
/// batch norms, or with `every_layer` all of them.
pub(super) fn over_ranks<T>(
    worker: &Rc<Worker>,
    x: &Outputs,
    every_layer: bool,
    forward: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let group = worker.group().filter(|group| x.is_training() && group.world_size() > 1);
    let Some(group) = group else { return forward() };
    let ranks = Rc::new(Ranks { worker: Rc::clone(worker), group, failure: RefCell::default() });
    let output = ice_nn::over_ranks(Rc::clone(&ranks) as Rc<dyn ice_nn::Ranks>, every_layer, forward);
    // After a failed exchange, tensors and errors of later layers are meaningless.
    ranks.failure.take().map_or(output, Err)
}
