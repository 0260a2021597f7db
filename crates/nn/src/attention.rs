use std::borrow::Borrow;

use tch::nn::{Module, Path};
use tch::{Kind, Tensor};

use crate::dropout::probability;
use crate::init;
use crate::linear::Linear;
use crate::parameter::parameter;

/// Attention of queries to keys and values, in several heads (Vaswani et al., 2017): PyTorch's
/// `MultiheadAttention`.
///
/// The weights of queries, keys and values are one tensor, `in_proj_weight`, `[3·embed, embed]`. If
/// keys or values have another number of features, there are three instead: `q_proj_weight`,
/// `k_proj_weight` and `v_proj_weight`.
///
/// These weights are drawn evenly from within ±√(6/(rows + columns)), and `out_proj.weight` from
/// within ±1/√embed. All biases begin with 0.
#[derive(Debug)]
pub struct MultiheadAttention {
    /// Weights of queries, keys and values.
    pub in_proj: InProjection,
    /// Biases of queries, keys and values, `[3·embed]`.
    pub in_proj_bias: Option<Tensor>,
    /// Combines the heads.
    pub out_proj: Linear,
    heads: i64,
    dropout: f64,
    batch_first: bool,
}

/// The weights that project the inputs to queries, keys and values.
#[derive(Debug)]
pub enum InProjection {
    /// `in_proj_weight`, `[3·embed, embed]`.
    Packed(Tensor),
    /// `q_proj_weight`, `k_proj_weight` and `v_proj_weight`, `[embed, features]` each.
    Separate([Tensor; 3]),
}

/// Options of a [`MultiheadAttention`].
#[derive(Debug, Clone)]
#[must_use]
pub struct MultiheadAttentionOptions {
    embed_dim: i64,
    num_heads: i64,
    dropout: f64,
    bias: bool,
    kdim: Option<i64>,
    vdim: Option<i64>,
    batch_first: bool,
}

/// The keys that are hidden from queries.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionMask<'a> {
    causal: bool,
    pairs: Option<&'a Tensor>,
    keys: Option<&'a Tensor>,
}

impl<'a> AttentionMask<'a> {
    /// Returns a mask with which every query attends to every key.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Returns a mask with which query `i` attends to keys `0..=i`.
    #[must_use]
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Returns a mask from PyTorch's `attn_mask`: `[queries, keys]`, or `[n·heads, queries, keys]`.
    /// **True hides the key from the query**, unlike in `scaled_dot_product_attention`. Floats are
    /// added to the scores.
    #[must_use]
    pub fn of_pairs(mask: &'a Tensor) -> Self {
        Self { pairs: Some(mask), ..Self::default() }
    }

    /// Also hides keys from all queries, by PyTorch's `key_padding_mask`: `[n, keys]`. True hides
    /// the key. Floats are added to the scores.
    #[must_use]
    pub fn and_keys(mut self, mask: &'a Tensor) -> Self {
        self.keys = Some(mask);
        self
    }
}

impl MultiheadAttention {
    /// Makes the layer with PyTorch's defaults: no dropout, with biases, and inputs of
    /// `[length, n, features]`.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, embed_dim: i64, num_heads: i64) -> Self {
        Self::options(embed_dim, num_heads).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(embed_dim: i64, num_heads: i64) -> MultiheadAttentionOptions {
        MultiheadAttentionOptions {
            embed_dim,
            num_heads,
            dropout: 0.0,
            bias: true,
            kdim: None,
            vdim: None,
            batch_first: false,
        }
    }

    /// Computes one output per query: PyTorch's `forward` with `need_weights=False`.
    ///
    /// Queries and outputs are `[length, n, embed]`. Keys and values may have another length. With
    /// `batch_first(true)`, `n` is the first dimension. Inputs of two dimensions have no `n`.
    ///
    /// For self-attention, give the same reference three times: one matrix product then projects it
    /// to queries, keys and values.
    ///
    /// # Panics
    /// If the shapes of inputs or masks do not fit.
    pub fn forward_t(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: &AttentionMask,
        train: bool,
    ) -> Tensor {
        let [q, k, v] = self.by_head(query, key, value);
        let dropout = if train { self.dropout } else { 0.0 };
        let only_causal = mask.causal && mask.keys.is_none();
        let added = if only_causal { None } else { self.added(mask, &q, &k) };
        let seen = Tensor::scaled_dot_product_attention(&q, &k, &v, added, dropout, only_causal, None, false);
        self.combine(&seen, query)
    }

    /// Computes outputs and attention weights, `[n, heads, queries, keys]`: PyTorch's `forward`
    /// with `average_attn_weights=False`.
    ///
    /// This needs memory for all pairs of queries and keys. The inputs are those of
    /// [`MultiheadAttention::forward_t`].
    ///
    /// # Panics
    /// If the shapes of inputs or masks do not fit.
    pub fn forward_with_weights(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: &AttentionMask,
        train: bool,
    ) -> (Tensor, Tensor) {
        let [q, k, v] = self.by_head(query, key, value);
        let scores = (&q * (1.0 / q.size()[3] as f64).sqrt()).matmul(&k.transpose(-2, -1));
        let scores = match self.added(mask, &q, &k) {
            Some(added) => scores + added,
            None => scores,
        };
        let weights = scores.softmax(-1, None).dropout(self.dropout, train);
        (self.combine(&weights.matmul(&v), query), weights)
    }

    /// Returns queries, keys and values by head, `[n, heads, length, embed/heads]`.
    fn by_head(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> [Tensor; 3] {
        let is_self = std::ptr::eq(query, key) && std::ptr::eq(key, value);
        let inputs = [query, key, value].map(|x| self.batch_first(x));
        let projected = match &self.in_proj {
            InProjection::Packed(weight) if is_self => {
                thirds(&inputs[0].linear(weight, self.in_proj_bias.as_ref()), -1)
            }
            InProjection::Packed(weight) => self.project(&inputs, &thirds(weight, 0)),
            InProjection::Separate(weights) => self.project(&inputs, weights),
        };
        projected.map(|x| {
            let size = x.size();
            x.view([size[0], size[1], self.heads, size[2] / self.heads]).transpose(1, 2)
        })
    }

    fn project(&self, inputs: &[Tensor; 3], weights: &[Tensor; 3]) -> [Tensor; 3] {
        let biases = self.in_proj_bias.as_ref().map(|bias| thirds(bias, 0));
        std::array::from_fn(|n| inputs[n].linear(&weights[n], biases.as_ref().map(|biases| &biases[n])))
    }

    /// Turns `[n, heads, length, embed/heads]` into outputs with the shape of the queries.
    fn combine(&self, seen: &Tensor, query: &Tensor) -> Tensor {
        let size = seen.size();
        let seen = seen.transpose(1, 2).reshape([size[0], size[2], size[1] * size[3]]);
        let output = self.out_proj.forward(&seen);
        match query.dim() {
            2 => output.squeeze_dim(0),
            _ if self.batch_first => output,
            _ => output.transpose(0, 1),
        }
    }

    /// Returns `x` as `[n, length, features]`.
    fn batch_first(&self, x: &Tensor) -> Tensor {
        match x.dim() {
            2 => x.unsqueeze(0),
            _ if self.batch_first => x.shallow_clone(),
            _ => x.transpose(0, 1),
        }
    }

    /// Returns the mask as floats to add to the scores, in a shape that broadcasts to
    /// `[n, heads, queries, keys]`. Returns `None` for a mask that hides nothing.
    #[track_caller]
    fn added(&self, mask: &AttentionMask, query: &Tensor, key: &Tensor) -> Option<Tensor> {
        let (n, queries, keys) = (query.size()[0], query.size()[2], key.size()[2]);
        let causal = mask.causal.then(|| Tensor::ones([queries, keys], (Kind::Bool, query.device())).triu(1));
        let pairs = mask.pairs.map(|mask| match mask.dim() {
            2 => shaped(mask, &[queries, keys]).shallow_clone(),
            _ => shaped(mask, &[n * self.heads, queries, keys]).view([n, self.heads, queries, keys]),
        });
        let padding = mask.keys.map(|mask| match mask.dim() {
            1 => shaped(mask, &[keys]).view([1, 1, 1, keys]),
            _ => shaped(mask, &[n, keys]).view([n, 1, 1, keys]),
        });
        let masks = [causal, pairs, padding].into_iter().flatten().map(|mask| match mask.kind() {
            Kind::Bool => mask.zeros_like().to_kind(query.kind()).masked_fill(&mask, f64::NEG_INFINITY),
            _ => mask,
        });
        masks.reduce(|sum, mask| sum + mask)
    }
}

impl MultiheadAttentionOptions {
    /// Probability with which training hides a key from a query. Default: 0.
    pub fn dropout(mut self, p: f64) -> Self {
        self.dropout = p;
        self
    }

    /// Whether there are biases. Default: true.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Features of the keys. Default: those of the queries.
    pub fn kdim(mut self, features: i64) -> Self {
        self.kdim = Some(features);
        self
    }

    /// Features of the values. Default: those of the queries.
    pub fn vdim(mut self, features: i64) -> Self {
        self.vdim = Some(features);
        self
    }

    /// Whether inputs and outputs are `[n, length, features]`. Default: false.
    pub fn batch_first(mut self, first: bool) -> Self {
        self.batch_first = first;
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, if the features are no multiple of the heads, or if
    /// dropout is no probability.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> MultiheadAttention {
        let (path, embed, heads) = (path.borrow(), self.embed_dim, self.num_heads);
        assert!(
            embed > 0 && heads > 0 && embed % heads == 0,
            "{embed} features cannot be divided into {heads} heads"
        );
        let dropout = probability(self.dropout);
        let (kdim, vdim) = (self.kdim.unwrap_or(embed), self.vdim.unwrap_or(embed));
        let in_proj = if (kdim, vdim) == (embed, embed) {
            InProjection::Packed(parameter(path, "in_proj_weight", &[3 * embed, embed]))
        } else {
            let of = |(name, features): (&str, i64)| parameter(path, name, &[embed, features]);
            InProjection::Separate(
                [("q_proj_weight", embed), ("k_proj_weight", kdim), ("v_proj_weight", vdim)].map(of),
            )
        };
        let in_proj_bias = self.bias.then(|| parameter(path, "in_proj_bias", &[3 * embed]));
        let out_proj = Linear::options(embed, embed).bias(self.bias).build(path / "out_proj");
        // PyTorch draws these weights after those of `out_proj`. The same order gives the same
        // values.
        match &in_proj {
            InProjection::Packed(weight) => init::xavier_uniform_(weight, 1.0),
            InProjection::Separate(weights) => {
                weights.iter().for_each(|weight| init::xavier_uniform_(weight, 1.0))
            }
        }
        in_proj_bias.iter().chain(&out_proj.bs).for_each(init::zeros_);
        MultiheadAttention { in_proj, in_proj_bias, out_proj, heads, dropout, batch_first: self.batch_first }
    }
}

/// Splits a tensor into three equal parts along a dimension.
fn thirds(x: &Tensor, dim: i64) -> [Tensor; 3] {
    let mut parts = x.chunk(3, dim);
    std::array::from_fn(|_| parts.remove(0))
}

/// Panics if the mask has another shape: broadcasting would accept some of them silently.
#[track_caller]
fn shaped<'a>(mask: &'a Tensor, shape: &[i64]) -> &'a Tensor {
    assert!(mask.size() == shape, "a mask of shape {:?} instead of {shape:?}", mask.size());
    mask
}
