//! New values for existing tensors: the functions of PyTorch's `torch.nn.init`
//! (`torch/nn/init.py`).
//!
//! All of them draw from libtorch's CPU generator, so that one seed gives the same values on every
//! device. They record no gradients.
//!
//! In the book: `docs/nn.md`.

use tch::nn::Init;
use tch::{Device, Tensor};

/// The side of a weight that [`kaiming_uniform_`] and [`kaiming_normal_`] count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fan {
    /// The inputs: keeps the variance of the forward pass.
    #[default]
    In,
    /// The outputs: keeps the variance of the backward pass.
    Out,
}

/// The function that follows a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Nonlinearity {
    /// No function, or a linear layer or convolution.
    Linear,
    /// The logistic function.
    Sigmoid,
    /// The hyperbolic tangent.
    Tanh,
    /// The positive part.
    Relu,
    /// [`Nonlinearity::Relu`] with this slope below zero.
    LeakyRelu(f64),
    /// The scaled exponential linear unit (Klambauer et al., 2017).
    Selu,
}

impl Nonlinearity {
    /// Returns the factor of the weights' standard deviation: PyTorch's `calculate_gain`.
    #[must_use]
    pub fn gain(self) -> f64 {
        match self {
            Self::Linear | Self::Sigmoid => 1.0,
            Self::Tanh => 5.0 / 3.0,
            Self::Relu => 2f64.sqrt(),
            Self::LeakyRelu(slope) => (2.0 / (1.0 + slope.powi(2))).sqrt(),
            Self::Selu => 3.0 / 4.0,
        }
    }
}

/// Draws evenly from `low..high`.
pub fn uniform_(tensor: &Tensor, low: f64, high: f64) {
    fill(tensor, |values| {
        let _ = values.uniform_(low, high);
    });
}

/// Draws from a normal distribution.
pub fn normal_(tensor: &Tensor, mean: f64, std: f64) {
    fill(tensor, |values| {
        let _ = values.normal_(mean, std);
    });
}

/// Sets all elements to `value`.
pub fn constant_(tensor: &Tensor, value: f64) {
    tch::no_grad(|| {
        let _ = tensor.shallow_clone().fill_(value);
    });
}

/// Sets all elements to 0.
pub fn zeros_(tensor: &Tensor) {
    constant_(tensor, 0.0);
}

/// Sets all elements to 1.
pub fn ones_(tensor: &Tensor) {
    constant_(tensor, 1.0);
}

/// Draws evenly from within ±gain·√(3/fan) (He et al., 2015).
///
/// # Panics
/// If the tensor has fewer than two dimensions.
#[track_caller]
pub fn kaiming_uniform_(tensor: &Tensor, fan: Fan, nonlinearity: Nonlinearity) {
    if tensor.numel() > 0 {
        let bound = 3f64.sqrt() * kaiming_std(tensor, fan, nonlinearity);
        uniform_(tensor, -bound, bound);
    }
}

/// Draws from a normal distribution with a standard deviation of gain/√fan (He et al., 2015).
///
/// # Panics
/// If the tensor has fewer than two dimensions.
#[track_caller]
pub fn kaiming_normal_(tensor: &Tensor, fan: Fan, nonlinearity: Nonlinearity) {
    if tensor.numel() > 0 {
        normal_(tensor, 0.0, kaiming_std(tensor, fan, nonlinearity));
    }
}

/// Draws evenly from within ±gain·√(6/(fan in + fan out)) (Glorot and Bengio, 2010).
///
/// # Panics
/// If the tensor has fewer than two dimensions.
#[track_caller]
pub fn xavier_uniform_(tensor: &Tensor, gain: f64) {
    let bound = 3f64.sqrt() * xavier_std(tensor, gain);
    uniform_(tensor, -bound, bound);
}

/// Draws from a normal distribution with a standard deviation of gain·√(2/(fan in + fan out))
/// (Glorot and Bengio, 2010).
///
/// # Panics
/// If the tensor has fewer than two dimensions.
#[track_caller]
pub fn xavier_normal_(tensor: &Tensor, gain: f64) {
    normal_(tensor, 0.0, xavier_std(tensor, gain));
}

/// Fills a matrix with orthonormal rows or columns, times `gain`; dimensions after the second one
/// count as columns (Saxe et al., 2013).
///
/// # Panics
/// If the tensor has fewer than two dimensions.
#[track_caller]
pub fn orthogonal_(tensor: &Tensor, gain: f64) {
    fans(tensor);
    if tensor.numel() > 0 {
        fill(tensor, |values| Init::Orthogonal { gain }.set(values));
    }
}

/// Draws from the part of a normal distribution that lies in `low..=high`, as PyTorch does since
/// 2.13. PyTorch's defaults are mean 0, deviation 1, -2 and 2.
///
/// If that part has more than 30% of the distribution, values outside of it are drawn again.
/// Otherwise even values are drawn, and accepted by their density.
///
/// # Panics
/// If `low` is not below `high`, or if `std` is not positive.
#[track_caller]
pub fn trunc_normal_(tensor: &Tensor, mean: f64, std: f64, low: f64, high: f64) {
    assert!(low < high && std > 0.0, "a deviation of {std} from {mean} between {low} and {high}");
    let below = |x: f64| Tensor::from((x - mean) / std / 2f64.sqrt()).erf().double_value(&[]) / 2.0;
    let inside = below(high) - below(low);
    fill(tensor, |values| {
        if inside > 0.3 {
            redraw_normal(values, mean, std, low, high);
        } else {
            reject_uniform(values, mean, std, low, high);
        }
    });
}

/// Draws normal values, and draws those outside the bounds again until none is left. The bounds are
/// first rounded to the kind of the values.
fn redraw_normal(values: &mut Tensor, mean: f64, std: f64, low: f64, high: f64) {
    let rounded = |bound: f64| Tensor::from(bound).to_kind(values.kind()).double_value(&[]);
    let (low, high) = (rounded(low), rounded(high));
    let _ = values.normal_(mean, std);
    loop {
        let outside = values.lt(low).logical_or(&values.gt(high));
        if !is_any(&outside) {
            return;
        }
        let again = values.empty_like().normal_(mean, std);
        values.copy_(&again.where_self(&outside, values));
    }
}

/// Draws even values within the bounds, and accepts each with the chance that its density gives. If
/// little of the normal distribution lies within, this needs fewer draws than `redraw_normal`.
fn reject_uniform(values: &mut Tensor, mean: f64, std: f64, low: f64, high: f64) {
    let mode = mean.clamp(low, high);
    let peak = -0.5 * ((mode - mean) / std).powi(2);
    let rejected = |candidates: &Tensor| {
        let density = ((candidates - mean) / std).square() * -0.5 - peak;
        candidates.empty_like().uniform_(0.0, 1.0).log().gt_tensor(&density)
    };
    let _ = values.uniform_(low, high);
    let mut pending = rejected(values);
    while is_any(&pending) {
        let candidates = values.empty_like().uniform_(low, high);
        values.copy_(&candidates.where_self(&pending, values));
        pending = rejected(&candidates).logical_and(&pending);
    }
}

fn is_any(mask: &Tensor) -> bool {
    mask.any().int64_value(&[]) != 0
}

/// Draws weight and bias evenly within ±1/√(fan in): `reset_parameters` of linear layers and
/// convolutions.
#[track_caller]
pub(crate) fn weight_and_bias(weight: &Tensor, bias: Option<&Tensor>) {
    // A slope of √5 gives the bound above. PyTorch computes it this way, and another rounding would
    // change the bits.
    kaiming_uniform_(weight, Fan::In, Nonlinearity::LeakyRelu(5f64.sqrt()));
    if let Some(bias) = bias {
        let (fan_in, _) = fans(weight);
        let bound = if fan_in > 0 { 1.0 / (fan_in as f64).sqrt() } else { 0.0 };
        uniform_(bias, -bound, bound);
    }
}

#[track_caller]
fn kaiming_std(tensor: &Tensor, fan: Fan, nonlinearity: Nonlinearity) -> f64 {
    let (fan_in, fan_out) = fans(tensor);
    let fan = match fan {
        Fan::In => fan_in,
        Fan::Out => fan_out,
    };
    nonlinearity.gain() / (fan as f64).sqrt()
}

#[track_caller]
fn xavier_std(tensor: &Tensor, gain: f64) -> f64 {
    let (fan_in, fan_out) = fans(tensor);
    gain * (2.0 / (fan_in + fan_out) as f64).sqrt()
}

/// Returns the inputs per output and the outputs per input of a weight `[out, in, …]`.
#[track_caller]
fn fans(weight: &Tensor) -> (i64, i64) {
    let size = weight.size();
    assert!(size.len() > 1, "a tensor of shape {size:?} has no inputs and outputs: it needs two dimensions");
    let field: i64 = size[2..].iter().product();
    (size[1] * field, size[0] * field)
}

/// Draws values on the CPU, and copies them to the tensor's device if that is another one. So one
/// seed gives the same values on every device.
fn fill(tensor: &Tensor, draw: impl FnOnce(&mut Tensor)) {
    tch::no_grad(|| {
        let mut tensor = tensor.shallow_clone();
        if tensor.device() == Device::Cpu {
            draw(&mut tensor);
        } else {
            let mut values = Tensor::empty(tensor.size(), (tensor.kind(), Device::Cpu));
            draw(&mut values);
            tensor.copy_(&values);
        }
    });
}
