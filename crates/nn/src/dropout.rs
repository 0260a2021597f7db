use tch::Tensor;
use tch::nn::ModuleT;

/// Zeroes elements at random in training and divides the remaining ones by `1 − p` (Srivastava et
/// al., 2014): PyTorch's `Dropout`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout(f64);

impl Dropout {
    /// Zeroes each element with probability `p`, which PyTorch defaults to 0.5.
    ///
    /// # Panics
    /// If `p` is not in 0..=1.
    #[must_use]
    #[track_caller]
    pub fn new(p: f64) -> Self {
        Self(probability(p))
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        x.dropout(self.0, train)
    }
}

/// Zeroes whole channels of `[n, channels, …]` at random in training (Tompson et al., 2015):
/// PyTorch's `Dropout2d`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout2d(f64);

impl Dropout2d {
    /// Zeroes each channel with probability `p`, which PyTorch defaults to 0.5.
    ///
    /// # Panics
    /// If `p` is not in 0..=1.
    #[must_use]
    #[track_caller]
    pub fn new(p: f64) -> Self {
        Self(probability(p))
    }
}

impl ModuleT for Dropout2d {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        x.feature_dropout(self.0, train)
    }
}

#[track_caller]
pub(crate) fn probability(p: f64) -> f64 {
    assert!((0.0..=1.0).contains(&p), "{p} is no probability");
    p
}
