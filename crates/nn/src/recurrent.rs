//! Recurrent layers: they run through a sequence step by step.

use std::borrow::Borrow;
use std::marker::PhantomData;

use tch::nn::Path;
use tch::{Cuda, Tensor};

use crate::dropout::probability;
use crate::init;
use crate::parameter::parameter;

/// A long short-term memory (Hochreiter and Schmidhuber, 1997): PyTorch's `LSTM`.
///
/// The parameters of the first layer are `weight_ih_l0` `[4·hidden, input]`, `weight_hh_l0`
/// `[4·hidden, hidden]`, `bias_ih_l0` and `bias_hh_l0` `[4·hidden]`. Those of the second layer end
/// in `_l1`, and those of the backward direction in `_reverse`. All are drawn evenly from within
/// ±1/√`hidden_size`.
#[derive(Debug)]
pub struct LSTM(Recurrent);

/// A gated recurrent unit (Cho et al., 2014): PyTorch's `GRU`.
///
/// The parameters have the names of an [`LSTM`]'s, and three gates instead of four. All are drawn
/// evenly from within ±1/√`hidden_size`.
#[derive(Debug)]
pub struct GRU(Recurrent);

/// Options of an [`LSTM`] or a [`GRU`].
#[derive(Debug, Clone)]
#[must_use]
pub struct RecurrentOptions<L> {
    input_size: i64,
    hidden_size: i64,
    num_layers: i64,
    bias: bool,
    batch_first: bool,
    dropout: f64,
    bidirectional: bool,
    layer: PhantomData<L>,
}

/// The common part of `LSTM` and `GRU`.
#[derive(Debug)]
struct Recurrent {
    weights: Vec<Tensor>,
    hidden_size: i64,
    num_layers: i64,
    bias: bool,
    batch_first: bool,
    dropout: f64,
    bidirectional: bool,
}

/// A kind of recurrent cell.
#[derive(Clone, Copy)]
struct Cell {
    gates: i64,
    /// Number of the kind in cuDNN's `cudnnRNNMode_t`.
    cudnn_mode: i64,
}

impl LSTM {
    const CELL: Cell = Cell { gates: 4, cudnn_mode: 2 };

    /// Makes the layer with PyTorch's defaults: one layer, one direction, `[length, n, features]`.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, input_size: i64, hidden_size: i64) -> Self {
        Self::options(input_size, hidden_size).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(input_size: i64, hidden_size: i64) -> RecurrentOptions<Self> {
        RecurrentOptions::new(input_size, hidden_size)
    }

    /// Runs over the sequences `x`, `[length, n, input_size]`. With `batch_first(true)`, `n` is the
    /// first dimension. Inputs of two dimensions have no `n`.
    ///
    /// `state` holds the first hidden state and cell state, `[layers·directions, n, hidden_size]`
    /// each. Default: zeros. Returns the last layer's hidden states,
    /// `[length, n, directions·hidden_size]`, and the state after the last step.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward_t(
        &self,
        x: &Tensor,
        state: Option<&(Tensor, Tensor)>,
        train: bool,
    ) -> (Tensor, (Tensor, Tensor)) {
        let layer = &self.0;
        let (x, unbatched) = layer.batched(x);
        let (hidden, cell) = match state {
            Some((hidden, cell)) if unbatched => (hidden.unsqueeze(1), cell.unsqueeze(1)),
            Some((hidden, cell)) => (hidden.shallow_clone(), cell.shallow_clone()),
            None => (layer.zero_state(&x), layer.zero_state(&x)),
        };
        let weights: Vec<_> = layer.weights.iter().collect();
        let (output, hidden, cell) = x.lstm(
            &[&hidden, &cell],
            &weights,
            layer.bias,
            layer.num_layers,
            layer.dropout,
            train,
            layer.bidirectional,
            layer.batch_first,
        );
        if unbatched {
            return (output.squeeze_dim(layer.batch_dim()), (hidden.squeeze_dim(1), cell.squeeze_dim(1)));
        }
        (output, (hidden, cell))
    }
}

impl GRU {
    const CELL: Cell = Cell { gates: 3, cudnn_mode: 3 };

    /// Makes the layer with PyTorch's defaults: one layer, one direction, `[length, n, features]`.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, input_size: i64, hidden_size: i64) -> Self {
        Self::options(input_size, hidden_size).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(input_size: i64, hidden_size: i64) -> RecurrentOptions<Self> {
        RecurrentOptions::new(input_size, hidden_size)
    }

    /// Runs over the sequences `x`, `[length, n, input_size]`. With `batch_first(true)`, `n` is the
    /// first dimension. Inputs of two dimensions have no `n`.
    ///
    /// `state` is the first hidden state, `[layers·directions, n, hidden_size]`. Default: zeros.
    /// Returns the last layer's hidden states, `[length, n, directions·hidden_size]`, and the state
    /// after the last step.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward_t(&self, x: &Tensor, state: Option<&Tensor>, train: bool) -> (Tensor, Tensor) {
        let layer = &self.0;
        let (x, unbatched) = layer.batched(x);
        let hidden = match state {
            Some(hidden) if unbatched => hidden.unsqueeze(1),
            Some(hidden) => hidden.shallow_clone(),
            None => layer.zero_state(&x),
        };
        let (output, hidden) = x.gru(
            &hidden,
            &layer.weights,
            layer.bias,
            layer.num_layers,
            layer.dropout,
            train,
            layer.bidirectional,
            layer.batch_first,
        );
        if unbatched {
            return (output.squeeze_dim(layer.batch_dim()), hidden.squeeze_dim(1));
        }
        (output, hidden)
    }
}

impl<L> RecurrentOptions<L> {
    fn new(input_size: i64, hidden_size: i64) -> Self {
        Self {
            input_size,
            hidden_size,
            num_layers: 1,
            bias: true,
            batch_first: false,
            dropout: 0.0,
            bidirectional: false,
            layer: PhantomData,
        }
    }

    /// Number of layers. Each runs over the hidden states of the layer before. Default: 1.
    pub fn num_layers(mut self, layers: i64) -> Self {
        self.num_layers = layers;
        self
    }

    /// Whether there are biases. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Whether inputs and outputs are `[n, length, features]`. States keep their shape. Default:
    /// false.
    pub fn batch_first(mut self, first: bool) -> Self {
        self.batch_first = first;
        self
    }

    /// Probability with which training zeroes an output of a layer that is not the last one.
    /// Default: 0.
    pub fn dropout(mut self, p: f64) -> Self {
        self.dropout = p;
        self
    }

    /// Whether each layer runs over the sequence in both directions. Default: false.
    pub fn bidirectional(mut self, both: bool) -> Self {
        self.bidirectional = both;
        self
    }

    #[track_caller]
    fn make(self, path: &Path, cell: Cell) -> Recurrent {
        let Self { input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, .. } =
            self;
        assert!(
            input_size > 0 && hidden_size > 0 && num_layers > 0,
            "{num_layers} layers of {hidden_size} cells over {input_size} features"
        );
        let dropout = probability(dropout);
        let directions = if bidirectional { &["", "_reverse"][..] } else { &[""] };
        let rows = cell.gates * hidden_size;
        let mut weights = Vec::new();
        for layer in 0..num_layers {
            let width = if layer == 0 { input_size } else { hidden_size * directions.len() as i64 };
            for direction in directions {
                let shapes = [
                    ("weight_ih", &[rows, width][..]),
                    ("weight_hh", &[rows, hidden_size]),
                    ("bias_ih", &[rows]),
                    ("bias_hh", &[rows]),
                ];
                for (name, shape) in &shapes[..if bias { 4 } else { 2 }] {
                    weights.push(parameter(path, &format!("{name}_l{layer}{direction}"), shape));
                }
            }
        }
        let bound = 1.0 / (hidden_size as f64).sqrt();
        weights.iter().for_each(|weight| init::uniform_(weight, -bound, bound));
        if path.device().is_cuda() && Cuda::cudnn_is_available() {
            // cuDNN needs the weights in one piece of memory. Otherwise it copies them in every
            // pass.
            tch::no_grad(|| {
                let _ = Tensor::internal_cudnn_rnn_flatten_weight(
                    &weights,
                    if bias { 4 } else { 2 },
                    input_size,
                    cell.cudnn_mode,
                    hidden_size,
                    0,
                    num_layers,
                    batch_first,
                    bidirectional,
                );
            });
        }
        Recurrent { weights, hidden_size, num_layers, bias, batch_first, dropout, bidirectional }
    }
}

impl RecurrentOptions<LSTM> {
    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, if a size is not positive, or if dropout is no
    /// probability.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> LSTM {
        LSTM(self.make(path.borrow(), LSTM::CELL))
    }
}

impl RecurrentOptions<GRU> {
    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, if a size is not positive, or if dropout is no
    /// probability.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> GRU {
        GRU(self.make(path.borrow(), GRU::CELL))
    }
}

impl Recurrent {
    fn batch_dim(&self) -> i64 {
        if self.batch_first { 0 } else { 1 }
    }

    /// Returns the input with a dimension `n`, and whether the input lacked that dimension.
    fn batched(&self, x: &Tensor) -> (Tensor, bool) {
        if x.dim() == 2 { (x.unsqueeze(self.batch_dim()), true) } else { (x.shallow_clone(), false) }
    }

    fn zero_state(&self, x: &Tensor) -> Tensor {
        let directions = if self.bidirectional { 2 } else { 1 };
        let n = x.size()[self.batch_dim() as usize];
        Tensor::zeros([self.num_layers * directions, n, self.hidden_size], (x.kind(), x.device()))
    }
}
