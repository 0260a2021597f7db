use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::rc::Rc;

use ice_worker::Worker;
use tch::Tensor;

use crate::meter::{self, Accuracy, Average, ConfusionMatrix, Dict, Meter, MovingAverage, Summation};
use crate::{Context, Measure, Node, NodeState, Outputs, Result, Value};

type Function<I> = dyn Fn(&Outputs) -> Result<I>;

/// A metric over an epoch, measured by a [`Meter`]. It is exact over ranks with different numbers
/// of samples: a rank without a share of a batch adds nothing. The batch is that of the dataset
/// that the metric depends on, directly or through other nodes. If there are several datasets,
/// [`MetricNode::samples_of`] selects the one that counts.
///
/// The output of the node is the value of its function.
///
/// ```
/// use ice_core::MetricNode;
/// use ice_core::meter::MovingAverage;
/// let hits = MetricNode::average(|x| Ok(x.tensor("net")?.argmax(-1, false).eq_tensor(&x.tensor("labels")?)));
/// let smooth = MetricNode::new(MovingAverage::decay(0.99), |x| x.tensor("losses"));
/// let top5 = MetricNode::accuracy(5, |x| Ok((x.tensor("net")?, x.tensor("labels")?)));
/// ```
pub struct MetricNode<M: Meter = Average> {
    function: Box<Function<M::Input>>,
    meter: Rc<RefCell<M>>,
    samples_of: Option<String>,
    /// Values of the step that does not count yet. `None` for a batch without a share for this
    /// rank.
    step: Vec<Option<Value>>,
}

impl<M: Meter> MetricNode<M> {
    /// Measures the value of `function` in each step, without gradients.
    pub fn new(meter: M, function: impl Fn(&Outputs) -> Result<M::Input> + 'static) -> Self {
        let (meter, samples_of, step) = (Rc::new(RefCell::new(meter)), None, Vec::new());
        Self { function: Box::new(function), meter, samples_of, step }
    }

    /// Sets the dataset whose samples are measured. Default: the dataset that the metric depends
    /// on.
    #[must_use]
    pub fn samples_of(mut self, dataset: impl Into<String>) -> Self {
        self.samples_of = Some(dataset.into());
        self
    }

    /// Returns the meter, to be read after an epoch. It is reset when the next epoch begins.
    ///
    /// ```
    /// use ice_core::{HyperGraph, MetricNode, Repeat, Task};
    /// let mut graph = HyperGraph::new();
    /// let confusion = MetricNode::confusion_matrix(10, |x| Ok((x.tensor("net")?, x.tensor("labels")?)));
    /// let matrix = confusion.meter();
    /// graph.add("confusion", confusion, "val")?;
    /// let tasks = Repeat::once().then(Task::eval("val")).call(move |run| {
    ///     let threes_taken_for_fives = matrix.borrow().counts()?[3][5];
    ///     Ok(())
    /// });
    /// # Ok::<(), ice_core::Error>(())
    /// ```
    pub fn meter(&self) -> Rc<RefCell<M>> {
        Rc::clone(&self.meter)
    }
}

impl MetricNode<Average> {
    /// Measures the average of `function`: a tensor with one element per sample of this rank, of
    /// any dtype that converts to double. `[n]` with 1 for a hit and 0 for a miss gives an
    /// accuracy.
    pub fn average(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self::new(Average::new(), function)
    }
}

impl MetricNode<Summation> {
    /// Measures the sum of all elements of `function`.
    pub fn sum(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self::new(Summation::new(), function)
    }
}

impl MetricNode<meter::Value> {
    /// Measures the mean of the elements of `function` in the last batch.
    pub fn last(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self::new(meter::Value::new(), function)
    }
}

impl MetricNode<MovingAverage> {
    /// Measures the average of the elements of `function` over the last `batches` batches.
    pub fn moving_average(
        batches: NonZeroUsize,
        function: impl Fn(&Outputs) -> Result<Tensor> + 'static,
    ) -> Self {
        Self::new(MovingAverage::window(batches), function)
    }
}

impl MetricNode<Dict> {
    /// Measures an average for each name of `function`, with one element per sample. The average of
    /// the first name is also the value of the node.
    ///
    /// ```
    /// use ice_core::MetricNode;
    /// let scores = MetricNode::dict(|x| {
    ///     let error = x.tensor("net")? - x.tensor("wanted")?;
    ///     Ok(vec![("squared", error.square()), ("absolute", error.abs())])
    /// });
    /// ```
    /// The node `val/scores` measures `val/scores.squared` and `val/scores.absolute`.
    pub fn dict<K: Into<String>>(function: impl Fn(&Outputs) -> Result<Vec<(K, Tensor)>> + 'static) -> Self {
        let named = move |x: &Outputs| {
            Ok(function(x)?.into_iter().map(|(name, values)| (name.into(), values)).collect())
        };
        Self::new(Dict::default(), named)
    }
}

impl MetricNode<Accuracy> {
    /// Measures the share of samples whose class is among the `k` highest scores. `function`
    /// returns scores `[.., classes]` and labels `[..]`.
    pub fn accuracy(k: usize, function: impl Fn(&Outputs) -> Result<(Tensor, Tensor)> + 'static) -> Self {
        Self::new(Accuracy::top(k), function)
    }
}

impl MetricNode<ConfusionMatrix> {
    /// Measures the counts of each combination of class and guess, with precision and recall.
    /// `function` returns scores `[.., classes]` or guesses `[..]`, and labels `[..]`.
    pub fn confusion_matrix(
        classes: usize,
        function: impl Fn(&Outputs) -> Result<(Tensor, Tensor)> + 'static,
    ) -> Self {
        Self::new(ConfusionMatrix::new(classes), function)
    }
}

impl<M: Meter + 'static> Node for MetricNode<M> {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let values = tch::no_grad(|| (self.function)(x))?;
        let values = Value::new(values);
        let share = x.share_for(self.samples_of.as_deref())?;
        self.step.push((share.here > 0).then(|| values.clone()));
        Ok(values)
    }

    fn step_end(&mut self) -> Result<()> {
        let mut meter = self.meter.borrow_mut();
        for values in self.step.drain(..) {
            match values.and_then(|values| values.downcast::<M::Input>().ok()) {
                Some(values) => meter.update(&values)?,
                None => meter.skip(),
            }
        }
        Ok(())
    }

    fn roll_back(&mut self) {
        self.step.clear();
    }

    fn is_measure(&self) -> bool {
        true
    }

    fn epoch_start(&mut self) {
        self.meter.borrow_mut().reset();
    }

    fn epoch_end(&mut self, _: &Worker) -> Result<Option<Measure>> {
        self.meter.borrow().evaluate().map(Some)
    }

    fn sync_measures(&mut self, worker: &Worker) -> Result<()> {
        self.meter.borrow_mut().sync(worker)
    }

    fn state(&self) -> NodeState {
        NodeState { values: self.meter.borrow().state(), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.meter.borrow_mut().load_state(&saved.values)
    }
}
