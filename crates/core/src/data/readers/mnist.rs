use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::Idx;
use crate::data::{Batch, Dataset};
use crate::{Error, Result};

/// Mean and standard deviation of the training images, with pixels from 0 to 1.
const MEAN: f64 = 0.1307;
const DEVIATION: f64 = 0.3081;

/// A part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The 60,000 training images.
    Train,
    /// The 10,000 test images.
    Test,
}

/// Images with their classes.
pub struct Labelled {
    /// Float `[n, 1, 28, 28]`, normalized.
    pub images: Tensor,
    /// Int64 `[n]`.
    pub labels: Tensor,
}

impl Batch for Labelled {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { images: f(self.images)?, labels: f(self.labels)? })
    }
}

/// MNIST: handwritten digits, read from the four original IDX files.
pub struct Mnist {
    images: Idx,
    labels: Idx,
}

impl Mnist {
    /// Reads one part from a folder with the files `train-images-idx3-ubyte`,
    /// `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`.
    ///
    /// # Errors
    /// [`Error::Data`] if a file is missing or damaged.
    pub fn open(folder: impl AsRef<Path>, split: Split) -> Result<Self> {
        let prefix = match split {
            Split::Train => "train",
            Split::Test => "t10k",
        };
        let path = folder.as_ref().join(format!("{prefix}-images-idx3-ubyte"));
        let open = |path: &Path, dimensions| {
            Idx::open(path, dimensions).map_err(|error| match error {
                Error::Data { path, problem } if !path.exists() => {
                    Error::Data { path, problem: format!("{problem}: scripts/fetch-mnist fetches it") }
                }
                error => error,
            })
        };
        let images = open(&path, 3)?;
        let labels = open(&folder.as_ref().join(format!("{prefix}-labels-idx1-ubyte")), 1)?;
        if images.rows() != labels.rows() {
            let problem = format!("has {} images for {} labels", images.rows(), labels.rows());
            return Err(Error::Data { path, problem });
        }
        Ok(Self { images, labels })
    }
}

impl Dataset for Mnist {
    type Batch = Labelled;

    fn len(&self) -> usize {
        self.labels.rows()
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Labelled> {
        let mut images = self.images.rows_at(indices)?.to_device(device).to_kind(Kind::Float);
        let labels = self.labels.rows_at(indices)?.to_device(device).to_kind(Kind::Int64);
        // In place: each new tensor of this size costs as much as its computation.
        let images =
            images.f_div_scalar_(255.0)?.f_sub_scalar_(MEAN)?.f_div_scalar_(DEVIATION)?.f_unsqueeze(1)?;
        Ok(Labelled { images, labels })
    }
}
