use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::data::{BatchLoader, BatchSize, Dataset, PrefetchOptions, RankSlot, Sampler, SamplerCursor};
use crate::node::is_between_passes;
use crate::{Context, Error, Node, NodeState, Outputs, Result, Round, Value};

/// Feeds a [`Dataset`] to the graph batch by batch, with a share for each rank.
///
/// The order of an epoch is one permutation, derived from the seed of the run and the number of the
/// epoch, with one cursor over it. Each iteration takes the next `batch_size × world size` samples,
/// and the ranks divide them in order of rank. A step thus has the same samples for any number of
/// ranks that share it. The remaining samples at the end are divided as evenly as possible.
///
/// ```
/// use ice_core::DatasetNode;
/// # use ice_core::{Result, data::Dataset};
/// # use tch::{Device, Tensor};
/// # struct Squares;
/// # impl Dataset for Squares {
/// #     type Batch = Tensor;
/// #     fn len(&self) -> usize { 100 }
/// #     fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
/// #         Ok(Tensor::from_slice(indices).to_device(device).square())
/// #     }
/// # }
/// let node = DatasetNode::new(Squares).shuffle(true).batch_size(32).workers(4).prefetch(8);
/// ```
pub struct DatasetNode<D: Dataset> {
    dataset: Arc<D>,
    shuffle: bool,
    batch_size: BatchSize,
    drop_last: bool,
    batches_per_epoch: Option<u64>,
    ahead: PrefetchOptions,
    seed: u64,
    feed: Option<BatchLoader<D>>,
    /// Position at the start of the step, or of the epoch.
    mark: SamplerCursor,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    samples: u64,
    shuffled: bool,
    pass: u64,
    cursor: u64,
    iteration: u64,
}

impl<D: Dataset> DatasetNode<D> {
    /// Creates a node over a dataset. Defaults: in order, one sample per rank and iteration,
    /// including the last samples, made in the thread of the step.
    pub fn new(dataset: D) -> Self {
        Self {
            dataset: Arc::new(dataset),
            shuffle: false,
            batch_size: BatchSize::PerRank(1),
            drop_last: false,
            batches_per_epoch: None,
            ahead: PrefetchOptions::default(),
            seed: 0,
            feed: None,
            mark: SamplerCursor::default(),
        }
    }

    /// Sets whether each pass over the samples has its own random order.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// Sets the number of samples per rank and iteration.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = BatchSize::PerRank(batch_size);
        self
    }

    /// Sets the number of samples of all ranks together per iteration, divided as evenly as
    /// possible. Replaces [`DatasetNode::batch_size`].
    #[must_use]
    pub fn global_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = BatchSize::InTotal(batch_size);
        self
    }

    /// Renamed to [`Self::global_batch_size`].
    #[deprecated(since = "0.2.0", note = "renamed to `global_batch_size`")]
    #[must_use]
    pub fn in_total(self, batch_size: usize) -> Self {
        self.global_batch_size(batch_size)
    }

    /// Sets whether to leave out the last samples of a pass if they do not fill a batch on every
    /// rank.
    #[must_use]
    pub fn drop_last(mut self, drop_last: bool) -> Self {
        self.drop_last = drop_last;
        self
    }

    /// Sets the number of batches of an epoch, independent of the number of samples. Passes over
    /// the samples continue across the ends of epochs: each sample is still seen once before any is
    /// seen again, and the batches are those of a run without this option.
    #[must_use]
    pub fn batches_per_epoch(mut self, batches: u64) -> Self {
        self.batches_per_epoch = Some(batches);
        self
    }

    /// Renamed to [`Self::batches_per_epoch`].
    #[deprecated(since = "0.2.0", note = "renamed to `batches_per_epoch`")]
    #[must_use]
    pub fn iterations(self, batches: u64) -> Self {
        self.batches_per_epoch(batches)
    }

    /// Sets the number of threads that make batches. Default: 0, the thread of the step makes them.
    ///
    /// The number affects neither the order of the samples, nor random numbers drawn from the
    /// [`Pass`](crate::data::Pass), nor the contents of checkpoints. libtorch's operations in these
    /// threads run on one core each. They must not draw from libtorch's random number generator,
    /// which belongs to the steps.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.ahead.workers = workers;
        self
    }

    /// Sets the number of batches of an epoch that are made ahead. Default: twice the number of
    /// workers. Has no effect without workers.
    #[must_use]
    pub fn prefetch(mut self, batches: usize) -> Self {
        self.ahead.prefetch = Some(batches);
        self
    }

    /// Returns the number of samples of the dataset.
    pub fn len(&self) -> usize {
        self.dataset.len()
    }

    /// Whether the dataset has no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Creates the feed of a rank, at the start of the data.
    fn make_feed(&self, seat: RankSlot, batch_ranks: u64) -> Result<BatchLoader<D>>
    where
        D: 'static,
    {
        let global_batch = self.batch_size.global(batch_ranks)?;
        let samples = self.dataset.len() as u64;
        let mut sampler =
            Sampler::new(samples, global_batch, self.shuffle.then_some(self.seed), self.drop_last);
        if sampler.remaining() == 0 {
            return Err(Error::Usage(format!(
                "{samples} samples do not fill one batch of {global_batch} on {} ranks",
                seat.world_size
            )));
        }
        if let Some(iterations) = self.batches_per_epoch {
            if iterations == 0 {
                return Err(Error::Usage("an epoch of 0 batches: give at least 1".into()));
            }
            sampler = sampler.batches_per_epoch(iterations);
        }
        let micro_batches = self.batch_size.micro_batches(batch_ranks, seat.world_size);
        BatchLoader::new(Arc::clone(&self.dataset), sampler, self.seed, self.ahead, seat, micro_batches)
    }

    fn feed(&mut self) -> Result<&mut BatchLoader<D>> {
        self.feed.as_mut().ok_or_else(|| Error::Graph("the dataset was not set up".into()))
    }
}

impl<D: Dataset + 'static> Node for DatasetNode<D> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        let samples = self.dataset.len() as u64;
        if samples > Sampler::MAX_SAMPLES {
            return Err(Error::Usage(format!(
                "{samples} samples are more than the {} that can be shuffled: divide the dataset, or make larger samples",
                Sampler::MAX_SAMPLES
            )));
        }
        self.seed = context.seed;
        let alone = RankSlot { rank: 0, world_size: 1, device: context.worker.device() };
        self.feed = Some(self.make_feed(alone, 1)?);
        Ok(())
    }

    fn enter_round(&mut self, round: &Round) -> Result<()> {
        let mut feed = self.make_feed(RankSlot::of(&round.worker), round.batch_ranks as u64)?;
        feed.seek(self.feed()?.sampler().place());
        self.feed = Some(feed);
        Ok(())
    }

    fn before_step(&mut self) -> Result<()> {
        self.mark = self.feed()?.sampler().place();
        Ok(())
    }

    fn epoch_start(&mut self) {
        self.mark = self.feed.as_ref().map(|feed| feed.sampler().place()).unwrap_or_default();
    }

    fn roll_back(&mut self) {
        let mark = self.mark;
        if let Some(feed) = &mut self.feed {
            feed.seek(mark);
        }
    }

    fn parts_left(&self) -> u64 {
        self.feed.as_ref().map_or(1, BatchLoader::parts_left)
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let (batch, share) = self.feed()?.next()?;
        x.set_share(share)?;
        Ok(Value::new(batch))
    }

    fn remaining(&self) -> Option<u64> {
        self.feed.as_ref().map(|feed| feed.sampler().remaining())
    }

    fn samples_ahead(&self, iterations: u64) -> Option<u64> {
        self.feed.as_ref().map(|feed| feed.sampler().samples_in(iterations))
    }

    fn iteration_end(&mut self) {
        if let Some(feed) = &mut self.feed {
            feed.advance();
        }
    }

    fn epoch_end(&mut self, _: &ice_worker::Worker) -> Result<Option<crate::Measure>> {
        if let Some(feed) = &mut self.feed {
            feed.next_epoch();
        }
        Ok(None)
    }

    fn state(&self) -> NodeState {
        let position = self.feed.as_ref().map(|feed| {
            let SamplerCursor { pass, cursor, iteration } = feed.sampler().place();
            Position { samples: feed.sampler().samples(), shuffled: self.shuffle, pass, cursor, iteration }
        });
        NodeState { values: serde_json::to_value(position).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn check_values(&self, values: &Json) -> Result<()> {
        let position = Position::deserialize(values).map_err(|error| Error::Resume(error.to_string()))?;
        let shuffled = |is: bool| if is { "shuffled" } else { "in order" };
        if position.shuffled != self.shuffle {
            return Err(Error::Resume(format!(
                "the samples were {} when the checkpoint was saved and are {} now",
                shuffled(position.shuffled),
                shuffled(self.shuffle)
            )));
        }
        let feed = self.feed.as_ref().ok_or_else(|| Error::Graph("the dataset was not set up".into()))?;
        let sampler = feed.sampler();
        if position.samples != sampler.samples() {
            return Err(Error::Resume(format!(
                "the dataset had {} samples when the checkpoint was saved and has {} now",
                position.samples,
                sampler.samples()
            )));
        }
        Ok(())
    }

    fn may_begin_after(&self, saved: &Json) -> bool {
        is_between_passes(saved)
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.check_values(&saved.values)?;
        let position =
            Position::deserialize(&saved.values).map_err(|error| Error::Resume(error.to_string()))?;
        let Position { pass, cursor, iteration, .. } = position;
        self.feed()?.seek(SamplerCursor { pass, cursor, iteration });
        Ok(())
    }
}
