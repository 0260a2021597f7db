use std::borrow::Borrow;

use tch::Tensor;
use tch::nn::{Module, Path};

use crate::init;
use crate::parameter::parameter;

/// `x·weightᵀ + bias`, over the last dimension: PyTorch's `Linear`.
///
/// Weight and bias are drawn evenly from within ±1/√`in_features`.
#[derive(Debug)]
pub struct Linear {
    /// `weight`, `[out_features, in_features]`
    pub ws: Tensor,
    /// `bias`, `[out_features]`
    pub bs: Option<Tensor>,
}

/// Options of a [`Linear`].
#[derive(Debug, Clone)]
#[must_use]
pub struct LinearOptions {
    in_features: i64,
    out_features: i64,
    bias: bool,
}

impl Linear {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, in_features: i64, out_features: i64) -> Self {
        Self::options(in_features, out_features).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(in_features: i64, out_features: i64) -> LinearOptions {
        LinearOptions { in_features, out_features, bias: true }
    }
}

impl LinearOptions {
    /// Whether there is a bias. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> Linear {
        let path = path.borrow();
        let weight = parameter(path, "weight", &[self.out_features, self.in_features]);
        let bias = self.bias.then(|| parameter(path, "bias", &[self.out_features]));
        init::weight_and_bias(&weight, bias.as_ref());
        Linear { ws: weight, bs: bias }
    }
}

impl Module for Linear {
    /// Maps `[…, in_features]` to `[…, out_features]`.
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.ws, self.bs.as_ref())
    }
}
