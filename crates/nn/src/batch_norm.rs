use std::borrow::Borrow;

use tch::nn::{ModuleT, Path};
use tch::{Kind, Tensor};

use crate::parameter::{buffer, scale_and_shift};
use crate::sync::{self, Ranks};

/// Batch normalisation over `N` dimensions (Ioffe and Szegedy, 2015): PyTorch's `BatchNorm1d`,
/// `BatchNorm2d` and `BatchNorm3d`.
///
/// `(x − mean)/√(var + eps)·weight + bias` for each channel. In training, mean and variance are
/// those of this rank's batch (of all ranks' batches: [`SyncBatchNorm`]), and the running ones move
/// towards them. In evaluation, mean and variance are the running ones.
///
/// A batch with one value per channel has no unbiased variance. Such a batch leaves the running
/// statistics unchanged: it may be the last of an epoch, or that of a rank without samples. If it
/// is the first batch, it is an error. In PyTorch, every such batch is an error.
///
/// `weight` and `running_var` begin with 1, the others with 0: `bias`, `running_mean` and
/// `num_batches_tracked`.
#[derive(Debug)]
pub struct BatchNorm<const N: usize = 2> {
    /// `weight`, `[features]`
    pub ws: Option<Tensor>,
    /// `bias`, `[features]`
    pub bs: Option<Tensor>,
    /// Running means, `[features]`, a buffer.
    pub running_mean: Option<Tensor>,
    /// Running unbiased variances, `[features]`, a buffer.
    pub running_var: Option<Tensor>,
    /// Number of training batches so far: int64 `[]`, a buffer.
    pub num_batches_tracked: Option<Tensor>,
    options: BatchNormOptions<N>,
}

/// Batch norm of `[n, features]` or `[n, features, length]`.
pub type BatchNorm1d = BatchNorm<1>;
/// Batch norm of `[n, features, height, width]`.
pub type BatchNorm2d = BatchNorm<2>;
/// Batch norm of `[n, features, depth, height, width]`.
pub type BatchNorm3d = BatchNorm<3>;
/// Batch norm of `[n, features, size…]`, with any number of dimensions. In training it takes its
/// statistics over the batches of all ranks: PyTorch's `SyncBatchNorm`.
///
/// The gradients are those of one process with the whole batch. Each layer costs one exchange of
/// `2·features + 1` numbers in the forward pass and one of `2·features` in the backward pass.
/// Outside a node that several ranks train, for example in an evaluation, it is an ordinary batch
/// norm. A rank without samples in a step computes with one sample, which counts in the statistics.
/// `ModuleNode::sync_batch_norm` makes all batch norms of a module such layers.
pub type SyncBatchNorm = BatchNorm<0>;

/// Options of a [`BatchNorm`].
#[derive(Debug, Clone)]
#[must_use]
pub struct BatchNormOptions<const N: usize> {
    features: i64,
    eps: f64,
    momentum: Option<f64>,
    affine: bool,
    bias: bool,
    track_running_stats: bool,
}

impl<const N: usize> BatchNorm<N> {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, num_features: i64) -> Self {
        Self::options(num_features).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(num_features: i64) -> BatchNormOptions<N> {
        const { assert!(N <= 3, "PyTorch has batch norms over one to three dimensions") };
        BatchNormOptions {
            features: num_features,
            eps: 1e-5,
            momentum: Some(0.1),
            affine: true,
            bias: true,
            track_running_stats: true,
        }
    }

    fn name() -> String {
        if N == 0 { "SyncBatchNorm".into() } else { format!("BatchNorm{N}d") }
    }

    /// Whether the statistics of a batch with this many values per channel count. One value has no
    /// unbiased variance, which would turn the running variance into NaN for good.
    ///
    /// Panics if the batch does not count, and no batch before it did.
    #[track_caller]
    fn counts(&self, values: f64, size: &[i64]) -> bool {
        if values != 1.0 {
            return true;
        }
        let batches = self.num_batches_tracked.as_ref();
        assert!(
            batches.is_some_and(|batches| batches.int64_value(&[]) > 0),
            "{} needs more than one value per channel in training, and got an input of shape {size:?}",
            Self::name()
        );
        false
    }

    /// Counts a training batch. Returns the share by which the running statistics move towards
    /// those of the batch.
    fn share(&self) -> f64 {
        if let Some(batches) = &self.num_batches_tracked {
            let batches = tch::no_grad(|| batches.shallow_clone().g_add_scalar_(1));
            if self.options.momentum.is_none() {
                return 1.0 / batches.double_value(&[]);
            }
        }
        self.options.momentum.unwrap_or_default()
    }

    fn within_rank(&self, x: &Tensor, size: &[i64], train: bool) -> Tensor {
        let of_batch = train || self.running_mean.is_none();
        let values = size.iter().product::<i64>() as f64 / size[1].max(1) as f64;
        let counts = !of_batch || self.counts(values, size);
        let share = if train && counts { self.share() } else { 0.0 };
        Tensor::batch_norm(
            x,
            self.ws.as_ref(),
            self.bs.as_ref(),
            self.running_mean.as_ref().filter(|_| counts),
            self.running_var.as_ref().filter(|_| counts),
            of_batch,
            share,
            self.options.eps,
            true,
        )
    }

    /// Normalizes in training, with statistics over the batches of all ranks. Returns `None` if an
    /// exchange failed: `ranks` keeps the error.
    fn over(&self, ranks: &dyn Ranks, x: &Tensor, size: &[i64]) -> Option<Tensor> {
        let statistics = sync::statistics(x, ranks)?;
        if self.counts(statistics.count, size) {
            let share = self.share();
            let unbiased = &statistics.var * (statistics.count / (statistics.count - 1.0));
            tch::no_grad(|| {
                for (running, of_batch) in
                    [(&self.running_mean, &statistics.mean), (&self.running_var, &unbiased)]
                {
                    if let Some(running) = running {
                        _ = running.shallow_clone().g_mul_scalar_(1.0 - share).g_add_(&(of_batch * share));
                    }
                }
            });
        }
        let (ws, bs) = (self.ws.as_ref(), self.bs.as_ref());
        let normalized = ice_c10d::batch_norm(ranks.group(), x, ws, bs, &statistics, self.options.eps);
        normalized.map_err(|error| ranks.fail(error)).ok()
    }
}

impl<const N: usize> BatchNormOptions<N> {
    /// Number added to the variance. Default: 1e-5.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Share by which running mean and variance move towards those of a batch. `None` averages over
    /// all batches. Default: 0.1.
    pub fn momentum(mut self, momentum: impl Into<Option<f64>>) -> Self {
        self.momentum = momentum.into();
        self
    }

    /// Whether there are `weight` and `bias`. Default: true.
    pub fn affine(mut self, affine: bool) -> Self {
        self.affine = affine;
        self
    }

    /// Whether there is a `bias` next to the `weight`. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Whether there are running statistics. Default: true. Without them, evaluations use the
    /// statistics of their batches, too.
    pub fn track_running_stats(mut self, track: bool) -> Self {
        self.track_running_stats = track;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> BatchNorm<N> {
        let (path, features) = (path.borrow(), [self.features]);
        let options = (path.kind(), path.device());
        let (weight, bias) = scale_and_shift(path, &features, self.affine, self.bias);
        let tracked =
            |name: &str, tensor: Tensor| self.track_running_stats.then(|| buffer(path, name, tensor));
        BatchNorm {
            ws: weight,
            bs: bias,
            running_mean: tracked("running_mean", Tensor::zeros(features, options)),
            running_var: tracked("running_var", Tensor::ones(features, options)),
            num_batches_tracked: tracked(
                "num_batches_tracked",
                Tensor::zeros([0; 0], (Kind::Int64, path.device())),
            ),
            options: self,
        }
    }
}

impl<const N: usize> ModuleT for BatchNorm<N> {
    /// Normalizes `[n, features, size…]`. The output has the same shape.
    ///
    /// # Panics
    /// If the shape does not fit. In training, if the batch has one value per channel and no
    /// training batch before it had more. Without running statistics, if any batch has one value
    /// per channel.
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let size = x.size();
        let fits = match N {
            0 => size.len() >= 2,
            1 => size.len() == 2 || size.len() == 3,
            _ => size.len() == N + 2,
        };
        assert!(fits, "{} got an input of shape {size:?}", Self::name());
        match sync::ranks(N == 0).filter(|_| train) {
            Some(ranks) => self.over(&*ranks, x, &size).unwrap_or_else(|| x.shallow_clone()),
            None => self.within_rank(x, &size, train),
        }
    }
}
