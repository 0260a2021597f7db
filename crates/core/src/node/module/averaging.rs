//! Averaging of gradients over the ranks, in an order that outlives the process.

use ice_c10d::{ProcessGroup, Reducer, ReducerOptions};
use tch::Tensor;

use crate::Result;

/// A reducer, and the learned order in which forward uses the parameters.
///
/// The position of an element in its bucket decides in which order the ranks' gradients are added,
/// and so the last bit of the sum. A resumed run must therefore know the order from its first step
/// on.
pub(super) struct Averaging {
    reducer: Reducer,
    /// The parameters in the order that the reducer was created with.
    parameters: Vec<(String, Tensor)>,
    order: Vec<usize>,
}

impl Averaging {
    /// Creates a reducer with an order that was learned before. Parameters missing from `order`
    /// come last, in the order in which forward seems to use them. Collective.
    pub(super) fn new(
        parameters: &[(String, Tensor)],
        order: &[String],
        group: &ProcessGroup,
        options: &ReducerOptions,
    ) -> Result<Self> {
        let place = |(name, _): &(String, Tensor)| {
            order.iter().position(|known| known == name).unwrap_or(order.len())
        };
        let mut parameters: Vec<_> =
            parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        parameters.sort_by_cached_key(place);
        let reducer = Reducer::new(&parameters, group, options)?;
        let order = (0..parameters.len()).collect();
        Ok(Self { reducer, parameters, order })
    }

    pub(super) fn prepare_forward(&self) -> Result<()> {
        Ok(self.reducer.prepare_forward()?)
    }

    pub(super) fn prepare_backward(&mut self, loss: &Tensor) -> Result<()> {
        Ok(self.reducer.prepare_backward(&[loss])?)
    }

    /// Learns the order once the first gradients exist, so that a checkpoint of the first step
    /// contains it.
    pub(super) fn after_backward(&mut self) -> Result<()> {
        if self.reducer.regroup()? {
            self.order = self.reducer.order()?;
        }
        Ok(())
    }

    /// Returns the names of the parameters in the order in which forward uses them.
    pub(super) fn order(&self) -> Vec<&str> {
        self.order.iter().map(|&place| self.parameters[place].0.as_str()).collect()
    }
}
