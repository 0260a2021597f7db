use std::rc::Rc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::data::{Dataset, Sampler};
use crate::{Context, Error, Node, NodeState, Outputs, Result, Value};

/// Feeds a [`Dataset`] to the graph, batch by batch, each rank its own share.
///
/// The order of an epoch is one permutation, made from the seed of the run and the number of the epoch, and one cursor
/// over it. Each iteration takes the next `batch_size × world size` samples; the ranks divide them in order of rank, so the
/// same samples are in a step however many ranks share it. What is left at the end is divided as evenly as it goes.
pub struct DatasetNode<D> {
    dataset: D,
    shuffle: bool,
    batch_size: usize,
    drop_last: bool,
    sampler: Option<Sampler>,
}

#[derive(Serialize, Deserialize)]
struct Position {
    samples: u64,
    epoch: u64,
    cursor: u64,
}

impl<D: Dataset> DatasetNode<D> {
    /// A node over a dataset: in order, one sample per rank and iteration, the last ones included.
    pub fn new(dataset: D) -> Self {
        Self { dataset, shuffle: false, batch_size: 1, drop_last: false, sampler: None }
    }

    /// Whether each epoch has an order of its own.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// Samples per rank and iteration.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }

    /// Whether to leave out the last samples of an epoch where they do not fill a batch on every rank.
    #[must_use]
    pub fn drop_last(mut self, drop_last: bool) -> Self {
        self.drop_last = drop_last;
        self
    }

    fn sampler(&self) -> Result<&Sampler> {
        self.sampler.as_ref().ok_or_else(|| Error::Graph("the dataset was not set up".into()))
    }
}

impl<D: Dataset + 'static> Node for DatasetNode<D> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        if self.batch_size == 0 {
            return Err(Error::Usage("a batch size of 0: give at least 1 sample per rank".into()));
        }
        let global_batch = (self.batch_size * context.worker.world_size()) as u64;
        let samples = self.dataset.len() as u64;
        let sampler =
            Sampler::new(samples, global_batch, self.shuffle.then_some(context.seed), self.drop_last);
        if sampler.remaining() == 0 {
            return Err(Error::Usage(format!(
                "{samples} samples do not fill one batch of {} on {} ranks",
                self.batch_size,
                context.worker.world_size()
            )));
        }
        self.sampler = Some(sampler);
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let worker = x.worker();
        let (indices, share) = self.sampler()?.batch(worker.rank() as u64, worker.world_size() as u64);
        x.set_share(share);
        Ok(Value::new(self.dataset.batch(&indices, x.device())?))
    }

    fn remaining(&self) -> Option<u64> {
        self.sampler.as_ref().map(Sampler::remaining)
    }

    fn iteration_end(&mut self) {
        if let Some(sampler) = &mut self.sampler {
            sampler.advance();
        }
    }

    fn epoch_end(&mut self, _: &ice_worker::Worker) -> Result<Option<crate::Measure>> {
        if let Some(sampler) = &mut self.sampler {
            sampler.next_epoch();
        }
        Ok(None)
    }

    fn state(&self) -> NodeState {
        let position = self.sampler.as_ref().map(|sampler| Position {
            samples: sampler.samples(),
            epoch: sampler.epoch(),
            cursor: sampler.cursor(),
        });
        NodeState { values: serde_json::to_value(position).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn check_values(&self, values: &Json) -> Result<()> {
        let position = Position::deserialize(values).map_err(|error| Error::Resume(error.to_string()))?;
        let sampler = self.sampler()?;
        if position.samples != sampler.samples() {
            return Err(Error::Resume(format!(
                "the dataset had {} samples when the checkpoint was saved and has {} now",
                position.samples,
                sampler.samples()
            )));
        }
        Ok(())
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.check_values(&saved.values)?;
        let position =
            Position::deserialize(&saved.values).map_err(|error| Error::Resume(error.to_string()))?;
        if let Some(sampler) = &mut self.sampler {
            sampler.seek(position.epoch, position.cursor);
        }
        Ok(())
    }
}

impl<D: Dataset + ?Sized> Dataset for Rc<D> {
    type Batch = D::Batch;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn batch(&self, indices: &[i64], device: tch::Device) -> Result<Self::Batch> {
        (**self).batch(indices, device)
    }
}
