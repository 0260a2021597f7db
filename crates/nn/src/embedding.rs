use std::borrow::Borrow;

use tch::Tensor;
use tch::nn::{Module, Path};

use crate::init;
use crate::parameter::parameter;

/// A vector for each index: PyTorch's `Embedding`.
///
/// The elements of the vectors are drawn from a normal distribution of mean 0 and deviation 1.
#[derive(Debug)]
pub struct Embedding {
    /// `weight`, `[num_embeddings, embedding_dim]`
    pub ws: Tensor,
    padding_idx: Option<i64>,
}

/// Options of an [`Embedding`].
#[derive(Debug, Clone)]
#[must_use]
pub struct EmbeddingOptions {
    num_embeddings: i64,
    embedding_dim: i64,
    padding_idx: Option<i64>,
}

impl Embedding {
    /// Makes the layer with PyTorch's defaults.
    #[track_caller]
    pub fn new<'a>(path: impl Borrow<Path<'a>>, num_embeddings: i64, embedding_dim: i64) -> Self {
        Self::options(num_embeddings, embedding_dim).build(path)
    }

    /// Returns options with PyTorch's defaults.
    pub fn options(num_embeddings: i64, embedding_dim: i64) -> EmbeddingOptions {
        EmbeddingOptions { num_embeddings, embedding_dim, padding_idx: None }
    }
}

impl EmbeddingOptions {
    /// Index of the vector that begins with zeros and gets no gradient. A negative index counts
    /// from the end. Default: none.
    pub fn padding_idx(mut self, index: impl Into<Option<i64>>) -> Self {
        self.padding_idx = index.into();
        self
    }

    /// Makes the layer.
    ///
    /// # Panics
    /// If the path has such a layer already, or if `padding_idx` is out of range.
    #[track_caller]
    pub fn build<'a>(self, path: impl Borrow<Path<'a>>) -> Embedding {
        let count = self.num_embeddings;
        let padding_idx = self.padding_idx.map(|index| {
            assert!((-count..count).contains(&index), "no index {index} among {count} embeddings");
            if index < 0 { count + index } else { index }
        });
        let weight = parameter(path.borrow(), "weight", &[count, self.embedding_dim]);
        init::normal_(&weight, 0.0, 1.0);
        if let Some(index) = padding_idx {
            init::zeros_(&weight.detach().get(index));
        }
        Embedding { ws: weight, padding_idx }
    }
}

impl Module for Embedding {
    /// Maps integers `[…]` to vectors `[…, embedding_dim]`.
    fn forward(&self, indices: &Tensor) -> Tensor {
        Tensor::embedding(&self.ws, indices, self.padding_idx.unwrap_or(-1), false, false)
    }
}
