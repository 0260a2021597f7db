//! Constructors under the names of `tch::nn`, so that programs written for it get PyTorch's initial
//! values as they are.

use std::borrow::Borrow;

use tch::nn::Path;

use crate::conv::{Conv, Conv1d, Conv2d, Conv3d, PaddingMode};
use crate::{BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Embedding, LayerNorm, Linear};

/// Options of [`linear`]; [`LinearOptions`](crate::LinearOptions) says what they are.
#[derive(Debug, Clone, Copy)]
pub struct LinearConfig {
    #[expect(missing_docs, reason = "the options have them")]
    pub bias: bool,
}

impl Default for LinearConfig {
    fn default() -> Self {
        Self { bias: true }
    }
}

/// Makes a [`Linear`] from the arguments of `tch::nn::linear`.
#[track_caller]
pub fn linear<'a>(path: impl Borrow<Path<'a>>, in_dim: i64, out_dim: i64, config: LinearConfig) -> Linear {
    Linear::options(in_dim, out_dim).bias(config.bias).build(path)
}

/// Options of [`conv1d`], [`conv2d`] and [`conv3d`]; [`ConvOptions`](crate::ConvOptions) says what
/// they are.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the options have them")]
pub struct ConvConfig {
    pub stride: i64,
    pub padding: i64,
    pub dilation: i64,
    pub groups: i64,
    pub bias: bool,
    pub padding_mode: PaddingMode,
}

impl Default for ConvConfig {
    fn default() -> Self {
        Self { stride: 1, padding: 0, dilation: 1, groups: 1, bias: true, padding_mode: PaddingMode::Zeros }
    }
}

#[track_caller]
fn conv<'a, const N: usize>(
    path: impl Borrow<Path<'a>>,
    in_dim: i64,
    out_dim: i64,
    kernel: i64,
    config: ConvConfig,
) -> Conv<N> {
    let ConvConfig { stride, padding, dilation, groups, bias, padding_mode } = config;
    let options = Conv::options(in_dim, out_dim, kernel).stride(stride).padding(padding);
    options.dilation(dilation).groups(groups).bias(bias).padding_mode(padding_mode).build(path)
}

/// Makes a [`Conv1d`] from the arguments of `tch::nn::conv1d`.
#[track_caller]
pub fn conv1d<'a>(
    path: impl Borrow<Path<'a>>,
    in_dim: i64,
    out_dim: i64,
    kernel: i64,
    config: ConvConfig,
) -> Conv1d {
    conv(path, in_dim, out_dim, kernel, config)
}

/// Makes a [`Conv2d`] from the arguments of `tch::nn::conv2d`.
#[track_caller]
pub fn conv2d<'a>(
    path: impl Borrow<Path<'a>>,
    in_dim: i64,
    out_dim: i64,
    kernel: i64,
    config: ConvConfig,
) -> Conv2d {
    conv(path, in_dim, out_dim, kernel, config)
}

/// Makes a [`Conv3d`] from the arguments of `tch::nn::conv3d`.
#[track_caller]
pub fn conv3d<'a>(
    path: impl Borrow<Path<'a>>,
    in_dim: i64,
    out_dim: i64,
    kernel: i64,
    config: ConvConfig,
) -> Conv3d {
    conv(path, in_dim, out_dim, kernel, config)
}

/// [`Conv1d`] under the name of `tch::nn`.
pub type Conv1D = Conv1d;
/// [`Conv2d`] under the name of `tch::nn`.
pub type Conv2D = Conv2d;
/// [`Conv3d`] under the name of `tch::nn`.
pub type Conv3D = Conv3d;

/// Options of [`batch_norm1d`], [`batch_norm2d`] and [`batch_norm3d`];
/// [`BatchNormOptions`](crate::BatchNormOptions) says what they are.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the options have them")]
pub struct BatchNormConfig {
    pub eps: f64,
    pub momentum: f64,
    pub affine: bool,
}

impl Default for BatchNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1, affine: true }
    }
}

#[track_caller]
fn batch_norm<'a, const N: usize>(
    path: impl Borrow<Path<'a>>,
    features: i64,
    config: BatchNormConfig,
) -> BatchNorm<N> {
    BatchNorm::options(features).eps(config.eps).momentum(config.momentum).affine(config.affine).build(path)
}

/// Makes a [`BatchNorm1d`] from the arguments of `tch::nn::batch_norm1d`.
#[track_caller]
pub fn batch_norm1d<'a>(path: impl Borrow<Path<'a>>, out_dim: i64, config: BatchNormConfig) -> BatchNorm1d {
    batch_norm(path, out_dim, config)
}

/// Makes a [`BatchNorm2d`] from the arguments of `tch::nn::batch_norm2d`.
#[track_caller]
pub fn batch_norm2d<'a>(path: impl Borrow<Path<'a>>, out_dim: i64, config: BatchNormConfig) -> BatchNorm2d {
    batch_norm(path, out_dim, config)
}

/// Makes a [`BatchNorm3d`] from the arguments of `tch::nn::batch_norm3d`.
#[track_caller]
pub fn batch_norm3d<'a>(path: impl Borrow<Path<'a>>, out_dim: i64, config: BatchNormConfig) -> BatchNorm3d {
    batch_norm(path, out_dim, config)
}

/// Options of [`layer_norm`]; [`LayerNormOptions`](crate::LayerNormOptions) says what they are.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the options have them")]
pub struct LayerNormConfig {
    pub eps: f64,
    pub elementwise_affine: bool,
}

impl Default for LayerNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, elementwise_affine: true }
    }
}

/// Makes a [`LayerNorm`] from the arguments of `tch::nn::layer_norm`.
#[track_caller]
pub fn layer_norm<'a>(path: impl Borrow<Path<'a>>, shape: Vec<i64>, config: LayerNormConfig) -> LayerNorm {
    LayerNorm::options(shape).eps(config.eps).elementwise_affine(config.elementwise_affine).build(path)
}

/// Options of [`embedding`].
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingConfig {
    /// The index of the vector that begins with zeros and gets no gradient. -1 for none.
    pub padding_idx: i64,
}

impl Default for EmbeddingConfig {
    fn default() -> Self {
        Self { padding_idx: -1 }
    }
}

/// Makes an [`Embedding`] from the arguments of `tch::nn::embedding`.
#[track_caller]
pub fn embedding<'a>(
    path: impl Borrow<Path<'a>>,
    num_embeddings: i64,
    embedding_dim: i64,
    config: EmbeddingConfig,
) -> Embedding {
    let padding_idx = Some(config.padding_idx).filter(|index| *index >= 0);
    Embedding::options(num_embeddings, embedding_dim).padding_idx(padding_idx).build(path)
}
