use std::borrow::Borrow;

use tch::Tensor;
use tch::nn::{Module, Path};

use crate::init;
use crate::parameter::parameter;
use crate::sizes::Sizes;

/// A convolution over `N` dimensions: PyTorch's `Conv1d`, `Conv2d` and `Conv3d`.
///
/// Weight and bias are drawn evenly from within ±1/√(`in_channels`/`groups` · elements of the
/// kernel).
#[derive(Debug)]
pub struct Conv<const N: usize> {
    /// `weight`, `[out_channels, in_channels / groups, kernel…]`
    pub ws: Tensor,
    /// `bias`, `[out_channels]`
    pub bs: Option<Tensor>,
    options: ConvOptions<N>,
}

/// A convolution of sequences, `[n, channels, length]`.
pub type Conv1d = Conv<1>;
/// A convolution of images, `[n, channels, height, width]`.
pub type Conv2d = Conv<2>;
/// A convolution of volumes, `[n, channels, depth, height, width]`.
pub type Conv3d = Conv<3>;

/// Options of a [`Conv`].
#[derive(Debug, Clone)]
#[must_use]
pub struct ConvOptions<const N: usize> {
    in_channels: i64,
    out_channels: i64,
    kernel: [i64; N],
    stride: [i64; N],
    padding: Padding<N>,
    dilation: [i64; N],
    groups: i64,
    bias: bool,
    padding_mode: PaddingMode,
}

/// The values beyond the borders of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PaddingMode {
    /// Zeros.
    #[default]
    Zeros,
    /// The input, mirrored at the outermost element.
    Reflect,
    /// The outermost element.
    Replicate,
    /// The input, continued from its opposite border.
    Circular,
}

#[derive(Debug, Clone, Copy)]
enum Padding<const N: usize> {
    /// This many elements on both sides of each dimension.
    Of([i64; N]),
    /// As many elements as keep the size.
    Same,
}

impl<const N: usize> Conv<N> {
    /// Makes the layer with PyTorch's defaults: stride 1, no padding, no dilation, one group, a
    /// bias.
    #[track_caller]
    pub fn new<'a>(
        path: impl Borrow<Path<'a>>,
        in_channels: i64,
        out_channels: i64,
        kernel_size: impl Into<Sizes<N>>,
    ) -> Self {
        Self::options(in_channels, out_channels, kernel_size).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(in_channels: i64, out_channels: i64, kernel_size: impl Into<Sizes<N>>) -> ConvOptions<N> {
        const { assert!(N >= 1 && N <= 3, "libtorch has convolutions over one to three dimensions") };
        ConvOptions {
            in_channels,
            out_channels,
            kernel: kernel_size.into().0,
            stride: [1; N],
            padding: Padding::Of([0; N]),
            dilation: [1; N],
            groups: 1,
            bias: true,
            padding_mode: PaddingMode::Zeros,
        }
    }
}

impl<const N: usize> ConvOptions<N> {
    /// Elements by which the kernel moves over the input. Default: 1.
    pub fn stride(mut self, stride: impl Into<Sizes<N>>) -> Self {
        self.stride = stride.into().0;
        self
    }

    /// Elements added on both sides of each dimension. Default: 0.
    pub fn padding(mut self, padding: impl Into<Sizes<N>>) -> Self {
        self.padding = Padding::Of(padding.into().0);
        self
    }

    /// Adds as many elements as keep the size: PyTorch's `padding="same"`. The stride must be 1.
    pub fn padding_same(mut self) -> Self {
        self.padding = Padding::Same;
        self
    }

    /// The values of added elements. Default: zeros.
    pub fn padding_mode(mut self, mode: PaddingMode) -> Self {
        self.padding_mode = mode;
        self
    }

    /// Elements of the input from one element of the kernel to the next. Default: 1.
    pub fn dilation(mut self, dilation: impl Into<Sizes<N>>) -> Self {
        self.dilation = dilation.into().0;
        self
    }

    /// Number of groups. The outputs of a group of channels depend on the inputs of that group
    /// only. Default: 1.
    pub fn groups(mut self, groups: i64) -> Self {
        self.groups = groups;
        self
    }

    /// Whether there is a bias. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, if a number of channels is no multiple of the groups,
    /// or if `padding_same` has a stride other than 1.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> Conv<N> {
        check_groups(self.groups, self.in_channels, self.out_channels);
        if let Padding::Same = self.padding {
            assert!(self.stride == [1; N], "a stride of {:?} does not keep the size", self.stride);
        }
        let shape = [&[self.out_channels, self.in_channels / self.groups], &self.kernel[..]].concat();
        let (weight, bias) = weight_and_bias(path.borrow(), &shape, self.bias.then_some(self.out_channels));
        Conv { ws: weight, bs: bias, options: self }
    }

    /// Returns the elements to add before and after each dimension, the last dimension first, as
    /// `Tensor::pad` takes them.
    fn borders(&self) -> Vec<i64> {
        let of = |dimension: usize| match self.padding {
            Padding::Of(padding) => [padding[dimension]; 2],
            Padding::Same => {
                let total = self.dilation[dimension] * (self.kernel[dimension] - 1);
                [total / 2, total - total / 2]
            }
        };
        (0..N).rev().flat_map(of).collect()
    }
}

impl<const N: usize> Module for Conv<N> {
    /// Maps `[n, in_channels, size…]` to `[n, out_channels, size…]`. Both may lack `n`.
    fn forward(&self, x: &Tensor) -> Tensor {
        let Self { ws, bs, options } = self;
        let ConvOptions { stride, dilation, groups, .. } = options;
        let bs = bs.as_ref();
        let (x, padding) = match (options.padding_mode, options.padding) {
            (PaddingMode::Zeros, Padding::Of(padding)) => (x.shallow_clone(), padding),
            (PaddingMode::Zeros, Padding::Same) => {
                return match N {
                    1 => x.conv1d_padding(ws, bs, stride, "same", dilation, *groups),
                    2 => x.conv2d_padding(ws, bs, stride, "same", dilation, *groups),
                    _ => x.conv3d_padding(ws, bs, stride, "same", dilation, *groups),
                };
            }
            (mode, _) => (x.pad(options.borders(), mode.name(), None), [0; N]),
        };
        match N {
            1 => x.conv1d(ws, bs, stride, padding, dilation, *groups),
            2 => x.conv2d(ws, bs, stride, padding, dilation, *groups),
            _ => x.conv3d(ws, bs, stride, padding, dilation, *groups),
        }
    }
}

impl PaddingMode {
    /// Returns the name that `Tensor::pad` takes.
    fn name(self) -> &'static str {
        match self {
            Self::Zeros => "constant",
            Self::Reflect => "reflect",
            Self::Replicate => "replicate",
            Self::Circular => "circular",
        }
    }
}

/// A transposed convolution over `N` dimensions, the gradient of a convolution: PyTorch's
/// `ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`.
///
/// Weight and bias are drawn evenly from within ±1/√(`out_channels`/`groups` · elements of the
/// kernel).
#[derive(Debug)]
pub struct ConvTranspose<const N: usize> {
    /// `weight`, `[in_channels, out_channels / groups, kernel…]`
    pub ws: Tensor,
    /// `bias`, `[out_channels]`
    pub bs: Option<Tensor>,
    options: ConvTransposeOptions<N>,
}

/// A transposed convolution of sequences, `[n, channels, length]`.
pub type ConvTranspose1d = ConvTranspose<1>;
/// A transposed convolution of images, `[n, channels, height, width]`.
pub type ConvTranspose2d = ConvTranspose<2>;
/// A transposed convolution of volumes, `[n, channels, depth, height, width]`.
pub type ConvTranspose3d = ConvTranspose<3>;

/// Options of a [`ConvTranspose`].
#[derive(Debug, Clone)]
#[must_use]
pub struct ConvTransposeOptions<const N: usize> {
    in_channels: i64,
    out_channels: i64,
    kernel: [i64; N],
    stride: [i64; N],
    padding: [i64; N],
    output_padding: [i64; N],
    dilation: [i64; N],
    groups: i64,
    bias: bool,
}

impl<const N: usize> ConvTranspose<N> {
    /// Makes the layer with PyTorch's defaults: stride 1, no padding, no dilation, one group, a
    /// bias.
    #[track_caller]
    pub fn new<'a>(
        path: impl Borrow<Path<'a>>,
        in_channels: i64,
        out_channels: i64,
        kernel_size: impl Into<Sizes<N>>,
    ) -> Self {
        Self::options(in_channels, out_channels, kernel_size).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(
        in_channels: i64,
        out_channels: i64,
        kernel_size: impl Into<Sizes<N>>,
    ) -> ConvTransposeOptions<N> {
        const { assert!(N >= 1 && N <= 3, "libtorch has convolutions over one to three dimensions") };
        ConvTransposeOptions {
            in_channels,
            out_channels,
            kernel: kernel_size.into().0,
            stride: [1; N],
            padding: [0; N],
            output_padding: [0; N],
            dilation: [1; N],
            groups: 1,
            bias: true,
        }
    }
}

impl<const N: usize> ConvTransposeOptions<N> {
    /// Stride of the convolution whose transpose this is. Default: 1.
    pub fn stride(mut self, stride: impl Into<Sizes<N>>) -> Self {
        self.stride = stride.into().0;
        self
    }

    /// Padding of the convolution whose transpose this is: elements that the output loses on both
    /// sides. Default: 0.
    pub fn padding(mut self, padding: impl Into<Sizes<N>>) -> Self {
        self.padding = padding.into().0;
        self
    }

    /// Elements by which the output is longer at the end of each dimension. Default: 0.
    pub fn output_padding(mut self, padding: impl Into<Sizes<N>>) -> Self {
        self.output_padding = padding.into().0;
        self
    }

    /// Elements of the output from one element of the kernel to the next. Default: 1.
    pub fn dilation(mut self, dilation: impl Into<Sizes<N>>) -> Self {
        self.dilation = dilation.into().0;
        self
    }

    /// Number of groups. The outputs of a group of channels depend on the inputs of that group
    /// only. Default: 1.
    pub fn groups(mut self, groups: i64) -> Self {
        self.groups = groups;
        self
    }

    /// Whether there is a bias. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, or if a number of channels is no multiple of the
    /// groups.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> ConvTranspose<N> {
        check_groups(self.groups, self.in_channels, self.out_channels);
        let shape = [&[self.in_channels, self.out_channels / self.groups], &self.kernel[..]].concat();
        let (weight, bias) = weight_and_bias(path.borrow(), &shape, self.bias.then_some(self.out_channels));
        ConvTranspose { ws: weight, bs: bias, options: self }
    }
}

impl<const N: usize> Module for ConvTranspose<N> {
    /// Maps `[n, in_channels, size…]` to `[n, out_channels, size…]`. Both may lack `n`.
    fn forward(&self, x: &Tensor) -> Tensor {
        let Self { ws, bs, options } = self;
        let ConvTransposeOptions { stride, padding, output_padding, dilation, groups, .. } = options;
        let bs = bs.as_ref();
        match N {
            1 => x.conv_transpose1d(ws, bs, stride, padding, output_padding, *groups, dilation),
            2 => x.conv_transpose2d(ws, bs, stride, padding, output_padding, *groups, dilation),
            _ => x.conv_transpose3d(ws, bs, stride, padding, output_padding, *groups, dilation),
        }
    }
}

#[track_caller]
fn check_groups(groups: i64, in_channels: i64, out_channels: i64) {
    assert!(
        groups > 0 && in_channels % groups == 0 && out_channels % groups == 0,
        "{in_channels} channels in and {out_channels} out cannot be divided into {groups} groups"
    );
}

#[track_caller]
fn weight_and_bias(path: &Path, shape: &[i64], bias: Option<i64>) -> (Tensor, Option<Tensor>) {
    let weight = parameter(path, "weight", shape);
    let bias = bias.map(|channels| parameter(path, "bias", &[channels]));
    init::weight_and_bias(&weight, bias.as_ref());
    (weight, bias)
}
