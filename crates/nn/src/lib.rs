//! PyTorch's layers for [`tch`]: the names, options and defaults of `torch.nn` in PyTorch 2.13.
//!
//! - **Initial values.** With the same seed and the same order of layers, the parameters begin as
//!   in PyTorch, to the bit on the CPU. They are drawn on the CPU for every device, as by
//!   `Net().to("cuda")`.
//! - **State dict.** Parameters and buffers have PyTorch's names, shapes and dtypes below the path
//!   of the layer.
//! - **Outputs.** The same operators of libtorch run, with the same arguments.
//!
//! Every layer is made in one of two ways:
//!
//! ```no_run
//! use ice_nn as nn;
//! let store = nn::VarStore::new(tch::Device::Cpu);
//! let path = store.root();
//! let fc = nn::Linear::new(&path / "fc", 320, 50);
//! let conv = nn::Conv2d::options(3, 64, 7).stride(2).padding(3).bias(false).build(&path / "conv");
//! ```
//!
//! Layers that compute the same in training and evaluation are [`Module`]s, the others
//! [`ModuleT`]s. Recurrent layers and attention have a `forward_t` of their own. In the closure of
//! a node, `x.is_training()` is the argument that they need.
//!
//! Fields have the names of tch's layers, `ws` and `bs`, and [`linear`], [`conv2d`] and others are
//! called like tch's functions: a program written for `tch::nn` gets PyTorch's initial values as it
//! is.
//!
//! # Panics
//! Mistakes of the program panic, like in tch, with a message that names them: a second layer at
//! one path, sizes that do not divide, an input of a wrong shape.
//!
//! In the book: `docs/nn.md`.

mod attention;
mod batch_norm;
mod conv;
mod dropout;
mod embedding;
mod functions;
pub mod init;
mod linear;
mod norm;
mod parameter;
mod recurrent;
mod sizes;
mod sync;

pub use attention::{AttentionMask, InProjection, MultiheadAttention, MultiheadAttentionOptions};
pub use batch_norm::{BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormOptions, SyncBatchNorm};
pub use conv::{
    Conv, Conv1d, Conv2d, Conv3d, ConvOptions, ConvTranspose, ConvTranspose1d, ConvTranspose2d,
    ConvTranspose3d, ConvTransposeOptions, PaddingMode,
};
pub use dropout::{Dropout, Dropout2d};
pub use embedding::{Embedding, EmbeddingOptions};
pub use functions::{
    BatchNormConfig, Conv1D, Conv2D, Conv3D, ConvConfig, EmbeddingConfig, LayerNormConfig, LinearConfig,
    batch_norm1d, batch_norm2d, batch_norm3d, conv1d, conv2d, conv3d, embedding, layer_norm, linear,
};
pub use linear::{Linear, LinearOptions};
pub use norm::{GroupNorm, GroupNormOptions, LayerNorm, LayerNormOptions, RMSNorm, RMSNormOptions};
pub use recurrent::{GRU, LSTM, RecurrentOptions};
pub use sizes::{Shape, Sizes};
pub use sync::{Ranks, over_ranks};

pub use tch::nn::{
    Func, FuncT, Id, Init, Module, ModuleT, Path, Sequential, SequentialT, VarStore, func, func_t, seq, seq_t,
};
