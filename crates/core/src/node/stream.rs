use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::data::{
    BatchSize, BatchStream, PrefetchOptions, RankSlot, SamplerCursor, StreamLoader, StreamOrder,
};
use crate::node::is_between_passes;
use crate::{Context, Error, Node, NodeState, Outputs, Result, Round, Value};

/// Feeds a [`Stream`](crate::data::Stream) to the graph batch by batch, with a share for each rank.
///
/// All ranks enumerate the samples in one order, derived from the seed of the run and the number of
/// the pass, and divide the next `batch_size × world size` of them. A checkpoint stores the number
/// of consumed samples of the pass. To resume, the node enumerates the earlier samples again
/// without loading them: with tar shards, it reads the headers of their members.
///
/// An epoch is a pass over a stream that knows its size. A stream without a size has epochs only
/// with [`StreamNode::batches_per_epoch`]; otherwise it needs tasks with a number of steps.
pub struct StreamNode<S: BatchStream> {
    stream: Arc<S>,
    buffer: Option<usize>,
    batch_size: BatchSize,
    drop_last: bool,
    batches_per_epoch: Option<u64>,
    ahead: PrefetchOptions,
    seed: u64,
    feed: Option<StreamLoader<S>>,
    /// Position at the start of the step, or of the epoch.
    mark: SamplerCursor,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    /// Other properties that the order depends on.
    of: Order,
    pass: u64,
    cursor: u64,
    iteration: u64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    shards: usize,
    samples: Option<u64>,
    buffer: Option<usize>,
}

impl<S: BatchStream> StreamNode<S> {
    /// Creates a node over a stream. Defaults: in order, one sample per rank and iteration,
    /// including the last samples, made in the thread of the step.
    pub fn new(stream: S) -> Self {
        Self {
            stream: Arc::new(stream),
            buffer: None,
            batch_size: BatchSize::PerRank(1),
            drop_last: false,
            batches_per_epoch: None,
            ahead: PrefetchOptions::default(),
            seed: 0,
            feed: None,
            mark: SamplerCursor::default(),
        }
    }

    /// Shuffles: reads the shards of each pass in a random order, and takes the next sample at
    /// random from a buffer of this many. With 1, the samples of a shard keep their order.
    #[must_use]
    pub fn shuffle(mut self, buffer: usize) -> Self {
        self.buffer = Some(buffer);
        self
    }

    /// Sets the number of samples per rank and iteration.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = BatchSize::PerRank(batch_size);
        self
    }

    /// Sets the number of samples of all ranks together per iteration, divided as evenly as
    /// possible. Replaces [`StreamNode::batch_size`].
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

    /// Sets the number of batches of an epoch. Passes over the stream continue across the ends
    /// of epochs.
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

    /// Sets the number of threads that make batches. See
    /// [`DatasetNode::workers`](crate::DatasetNode::workers).
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.ahead.workers = workers;
        self
    }

    /// Sets the number of batches that are made ahead. Default: twice the number of workers.
    #[must_use]
    pub fn prefetch(mut self, batches: usize) -> Self {
        self.ahead.prefetch = Some(batches);
        self
    }

    fn order(&self) -> Order {
        Order { shards: self.stream.shards(), samples: self.stream.samples(), buffer: self.buffer }
    }

    /// Creates the feed of a rank, at the start of the stream.
    fn make_feed(&self, seat: RankSlot, batch_ranks: u64) -> Result<StreamLoader<S>>
    where
        S: 'static,
    {
        let order = StreamOrder {
            shuffled: self.buffer.map(|buffer| (self.seed, buffer)),
            global_batch: self.batch_size.global(batch_ranks)?,
            drop_last: self.drop_last,
        };
        let stream = Arc::clone(&self.stream);
        let feed = StreamLoader::new(stream, order, self.batches_per_epoch, self.seed, self.ahead, seat)?;
        if feed.remaining() == Some(0) {
            return Err(Error::Usage(format!(
                "{} samples do not fill one batch of {} on {} ranks",
                self.stream.samples().unwrap_or(0),
                order.global_batch,
                seat.world_size
            )));
        }
        Ok(feed)
    }

    fn feed(&mut self) -> Result<&mut StreamLoader<S>> {
        self.feed.as_mut().ok_or_else(|| Error::Graph("the stream was not set up".into()))
    }
}

impl<S: BatchStream> StreamNode<S> {
    /// Parses the saved position. Fails if it belongs to another order.
    fn position(&self, values: &Json) -> Result<Position> {
        let position = Position::deserialize(values).map_err(|error| Error::Resume(error.to_string()))?;
        if position.of != self.order() {
            return Err(Error::Resume(format!(
                "the stream had {:?} when the checkpoint was saved and has {:?} now, which gives another order",
                position.of,
                self.order()
            )));
        }
        Ok(position)
    }
}

impl<S: BatchStream + 'static> Node for StreamNode<S> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        if self.batches_per_epoch == Some(0) {
            return Err(Error::Usage("an epoch of 0 batches: give at least 1".into()));
        }
        self.seed = context.seed;
        let alone = RankSlot { rank: 0, world_size: 1, device: context.worker.device() };
        self.feed = Some(self.make_feed(alone, 1)?);
        Ok(())
    }

    fn enter_round(&mut self, round: &Round) -> Result<()> {
        let mut feed = self.make_feed(RankSlot::of(&round.worker), round.batch_ranks as u64)?;
        feed.seek(self.feed()?.place());
        self.feed = Some(feed);
        Ok(())
    }

    fn before_step(&mut self) -> Result<()> {
        self.mark = self.feed()?.place();
        Ok(())
    }

    fn epoch_start(&mut self) {
        self.mark = self.feed.as_ref().map(StreamLoader::place).unwrap_or_default();
    }

    fn roll_back(&mut self) {
        let mark = self.mark;
        if let Some(feed) = &mut self.feed {
            feed.seek(mark);
        }
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let (batch, share) = self.feed()?.next()?;
        x.set_share(share)?;
        Ok(Value::new(batch))
    }

    fn remaining(&self) -> Option<u64> {
        self.feed.as_ref().and_then(StreamLoader::remaining)
    }

    fn samples_ahead(&self, iterations: u64) -> Option<u64> {
        self.feed.as_ref().and_then(|feed| feed.samples_in(iterations))
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
            let SamplerCursor { pass, cursor, iteration } = feed.place();
            Position { of: self.order(), pass, cursor, iteration }
        });
        NodeState { values: serde_json::to_value(position).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn may_begin_after(&self, saved: &Json) -> bool {
        is_between_passes(saved)
    }

    fn check_values(&self, values: &Json) -> Result<()> {
        self.position(values).map(drop)
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        let Position { pass, cursor, iteration, .. } = self.position(&saved.values)?;
        self.feed()?.seek(SamplerCursor { pass, cursor, iteration });
        Ok(())
    }
}
