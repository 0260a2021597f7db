//! Normalisation within each sample.

use std::borrow::Borrow;

use tch::Tensor;
use tch::nn::{Module, Path};

use crate::parameter::scale_and_shift;
use crate::sizes::Shape;

/// Normalisation over the last dimensions (Ba et al., 2016): PyTorch's `LayerNorm`.
///
/// `(x − mean)/√(var + eps)·weight + bias`. `weight` begins with 1, `bias` with 0.
#[derive(Debug)]
pub struct LayerNorm {
    /// `weight`, of the normalised shape.
    pub ws: Option<Tensor>,
    /// `bias`, of the normalised shape.
    pub bs: Option<Tensor>,
    options: LayerNormOptions,
}

/// Options of a [`LayerNorm`].
#[derive(Debug, Clone)]
#[must_use]
pub struct LayerNormOptions {
    shape: Vec<i64>,
    eps: f64,
    affine: bool,
    bias: bool,
}

impl LayerNorm {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, normalized_shape: impl Into<Shape>) -> Self {
        Self::options(normalized_shape).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(normalized_shape: impl Into<Shape>) -> LayerNormOptions {
        LayerNormOptions { shape: normalized_shape.into().0, eps: 1e-5, affine: true, bias: true }
    }
}

impl LayerNormOptions {
    /// Number added to the variance. Default: 1e-5.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Whether there are `weight` and `bias`. Default: true.
    pub fn elementwise_affine(mut self, affine: bool) -> Self {
        self.affine = affine;
        self
    }

    /// Whether there is a `bias` next to the `weight`. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> LayerNorm {
        let (weight, bias) = scale_and_shift(path.borrow(), &self.shape, self.affine, self.bias);
        LayerNorm { ws: weight, bs: bias, options: self }
    }
}

impl Module for LayerNorm {
    /// Normalizes `[…, normalized_shape…]`. The output has the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        let Self { ws, bs, options } = self;
        x.layer_norm(&options.shape, ws.as_ref(), bs.as_ref(), options.eps, true)
    }
}

/// Normalisation over groups of channels (Wu and He, 2018): PyTorch's `GroupNorm`.
///
/// `(x − mean)/√(var + eps)·weight + bias`. `weight` begins with 1, `bias` with 0.
#[derive(Debug)]
pub struct GroupNorm {
    /// `weight`, `[channels]`
    pub ws: Option<Tensor>,
    /// `bias`, `[channels]`
    pub bs: Option<Tensor>,
    options: GroupNormOptions,
}

/// Options of a [`GroupNorm`].
#[derive(Debug, Clone)]
#[must_use]
pub struct GroupNormOptions {
    groups: i64,
    channels: i64,
    eps: f64,
    affine: bool,
    bias: bool,
}

impl GroupNorm {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, num_groups: i64, num_channels: i64) -> Self {
        Self::options(num_groups, num_channels).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(num_groups: i64, num_channels: i64) -> GroupNormOptions {
        GroupNormOptions { groups: num_groups, channels: num_channels, eps: 1e-5, affine: true, bias: true }
    }
}

impl GroupNormOptions {
    /// Number added to the variance. Default: 1e-5.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
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

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, or if the channels are no multiple of the groups.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> GroupNorm {
        let Self { groups, channels, .. } = self;
        assert!(
            groups > 0 && channels % groups == 0,
            "{channels} channels cannot be divided into {groups} groups"
        );
        let (weight, bias) = scale_and_shift(path.borrow(), &[channels], self.affine, self.bias);
        GroupNorm { ws: weight, bs: bias, options: self }
    }
}

impl Module for GroupNorm {
    /// Normalizes `[n, channels, …]`. The output has the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        let Self { ws, bs, options } = self;
        x.group_norm(options.groups, ws.as_ref(), bs.as_ref(), options.eps, true)
    }
}

/// Division by the root mean square over the last dimensions (Zhang and Sennrich, 2019): PyTorch's
/// `RMSNorm`.
///
/// `x/√(mean(x²) + eps)·weight`. `weight` begins with 1.
#[derive(Debug)]
pub struct RMSNorm {
    /// `weight`, of the normalised shape.
    pub ws: Option<Tensor>,
    options: RMSNormOptions,
}

/// Options of an [`RMSNorm`].
#[derive(Debug, Clone)]
#[must_use]
pub struct RMSNormOptions {
    shape: Vec<i64>,
    eps: Option<f64>,
    affine: bool,
}

impl RMSNorm {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, normalized_shape: impl Into<Shape>) -> Self {
        Self::options(normalized_shape).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(normalized_shape: impl Into<Shape>) -> RMSNormOptions {
        RMSNormOptions { shape: normalized_shape.into().0, eps: None, affine: true }
    }
}

impl RMSNormOptions {
    /// Number added to the mean square. Default: the machine epsilon of the kind that libtorch
    /// computes in.
    pub fn eps(mut self, eps: impl Into<Option<f64>>) -> Self {
        self.eps = eps.into();
        self
    }

    /// Whether there is a `weight`. Default: true.
    pub fn elementwise_affine(mut self, affine: bool) -> Self {
        self.affine = affine;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> RMSNorm {
        let (weight, _) = scale_and_shift(path.borrow(), &self.shape, self.affine, false);
        RMSNorm { ws: weight, options: self }
    }
}

impl Module for RMSNorm {
    /// Normalizes `[…, normalized_shape…]`. The output has the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        x.rms_norm(&self.options.shape, self.ws.as_ref(), self.options.eps)
    }
}
