use std::borrow::Borrow;

use tch::nn::{ModuleT, Path};
use tch::{Kind, Tensor};

use crate::init;
use crate::parameter::{buffer, parameter};

/// Batch normalisation over `N` dimensions (Ioffe and Szegedy, 2015): PyTorch's `BatchNorm1d`, `BatchNorm2d` and
/// `BatchNorm3d`.
///
/// `(x − mean)/√(var + eps)·weight + bias` for each channel. Training takes mean and variance of this rank's batch, and moves
/// the running ones towards them. Evaluation takes the running ones.
///
/// A batch with one value per channel has no variance. It leaves the running ones alone, for it may be the last of an epoch, or
/// that of a rank without samples; if it is the first batch, it is an error. PyTorch makes it an error whenever it comes.
///
/// `weight` and `running_var` begin with 1, `bias`, `running_mean` and `num_batches_tracked` with 0.
#[derive(Debug)]
pub struct BatchNorm<const N: usize = 2> {
    /// `weight`, `[features]`
    pub ws: Option<Tensor>,
    /// `bias`, `[features]`
    pub bs: Option<Tensor>,
    /// `[features]`, a buffer.
    pub running_mean: Option<Tensor>,
    /// `[features]`, a buffer; of the unbiased variance.
    pub running_var: Option<Tensor>,
    /// Batches of training so far: int64 `[]`, a buffer.
    pub num_batches_tracked: Option<Tensor>,
    options: BatchNormOptions<N>,
}

/// Of `[n, features]` or `[n, features, length]`.
pub type BatchNorm1d = BatchNorm<1>;
/// Of `[n, features, height, width]`.
pub type BatchNorm2d = BatchNorm<2>;
/// Of `[n, features, depth, height, width]`.
pub type BatchNorm3d = BatchNorm<3>;

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

    /// PyTorch's defaults, to be changed.
    pub fn options(num_features: i64) -> BatchNormOptions<N> {
        const { assert!(N >= 1 && N <= 3, "PyTorch has batch norms over one to three dimensions") };
        BatchNormOptions {
            features: num_features,
            eps: 1e-5,
            momentum: Some(0.1),
            affine: true,
            bias: true,
            track_running_stats: true,
        }
    }

    /// Whether the statistics of this batch count. Those of one value per channel do not: it has no unbiased variance, which would
    /// make the running one NaN for good.
    #[track_caller]
    fn counts(&self, x: &Tensor) -> bool {
        let size = x.size();
        if size.iter().product::<i64>() != size[1] {
            return true;
        }
        let batches = self.num_batches_tracked.as_ref();
        assert!(
            batches.is_some_and(|batches| batches.int64_value(&[]) > 0),
            "BatchNorm{N}d needs more than one value per channel in training, and got an input of shape {size:?}"
        );
        false
    }
}

impl<const N: usize> BatchNormOptions<N> {
    /// Number added to the variance. Default: 1e-5.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// The share by which running mean and variance move towards those of a batch. `None` averages over all batches.
    /// Default: 0.1.
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

    /// Whether there are running statistics. Default: true. Without them, evaluations take the statistics of their batches, too.
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
        let weight = self.affine.then(|| parameter(path, "weight", &features));
        let bias = (self.affine && self.bias).then(|| parameter(path, "bias", &features));
        weight.iter().for_each(init::ones_);
        bias.iter().for_each(init::zeros_);
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
    /// `[n, features, size…]` to the same.
    ///
    /// # Panics
    /// If the shape is another one, or in training if no batch before this one had more than one value per channel.
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let size = x.size();
        let fits = size.len() == N + 2 || (N == 1 && size.len() == 2);
        assert!(fits, "BatchNorm{N}d got an input of shape {size:?}");
        let of_batch = train || self.running_mean.is_none();
        let counts = !of_batch || self.counts(x);
        let mut share = self.options.momentum.unwrap_or_default();
        if let Some(batches) = self.num_batches_tracked.as_ref().filter(|_| train && counts) {
            let batches = tch::no_grad(|| batches.shallow_clone().g_add_scalar_(1));
            if self.options.momentum.is_none() {
                share = 1.0 / batches.double_value(&[]);
            }
        }
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
}
