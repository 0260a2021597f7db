use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::{Dataset, idx};
use crate::{Error, Result};

/// Mean and standard deviation of the training images, with pixels from 0 to 1.
const MEAN: f64 = 0.1307;
const DEVIATION: f64 = 0.3081;

/// Which part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The 60,000 images to learn from.
    Train,
    /// The 10,000 images to test with.
    Test,
}

/// Images with their classes.
pub struct Labelled {
    /// Float `[n, 1, 28, 28]`, normalised.
    pub images: Tensor,
    /// Int64 `[n]`.
    pub labels: Tensor,
}

/// MNIST: handwritten digits, read from the four original IDX files.
pub struct Mnist {
    images: Tensor,
    labels: Tensor,
}

impl Mnist {
    /// Reads one part from a folder with the files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
    /// `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`.
    ///
    /// # Errors
    /// [`Error::Data`] names the file that is missing or damaged.
    pub fn open(folder: impl AsRef<Path>, split: Split) -> Result<Self> {
        let prefix = match split {
            Split::Train => "train",
            Split::Test => "t10k",
        };
        let path = folder.as_ref().join(format!("{prefix}-images-idx3-ubyte"));
        let images = idx::read::<3>(&path)?;
        let labels = idx::read::<1>(&folder.as_ref().join(format!("{prefix}-labels-idx1-ubyte")))?;
        if images.size()[0] != labels.size()[0] {
            let problem = format!("has {} images for {} labels", images.size()[0], labels.size()[0]);
            return Err(Error::Data { path, problem });
        }
        Ok(Self { images, labels })
    }
}

impl Dataset for Mnist {
    type Batch = Labelled;

    fn len(&self) -> usize {
        self.labels.size()[0] as usize
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Labelled> {
        let indices = Tensor::from_slice(indices);
        let images = self.images.f_index_select(0, &indices)?.to_device(device).to_kind(Kind::Float);
        let labels = self.labels.f_index_select(0, &indices)?.to_device(device).to_kind(Kind::Int64);
        Ok(Labelled { images: ((images / 255.0 - MEAN) / DEVIATION).unsqueeze(1), labels })
    }
}
