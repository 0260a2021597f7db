//! Adds the parameters and buffers of a layer to its path, each under a name of its own.

use tch::Tensor;
use tch::nn::Path;

use crate::init;

/// Adds a parameter of the path's kind and device, with values to be filled in.
#[track_caller]
pub(crate) fn parameter(path: &Path, name: &str, shape: &[i64]) -> Tensor {
    add(path, name, Tensor::empty(shape, (path.kind(), path.device())), true)
}

/// Adds the weight of a normalisation, ones, and its bias, zeros, if the layer has them.
#[track_caller]
pub(crate) fn scale_and_shift(
    path: &Path,
    shape: &[i64],
    affine: bool,
    bias: bool,
) -> (Option<Tensor>, Option<Tensor>) {
    let weight = affine.then(|| parameter(path, "weight", shape));
    let bias = (affine && bias).then(|| parameter(path, "bias", shape));
    weight.iter().for_each(init::ones_);
    bias.iter().for_each(init::zeros_);
    (weight, bias)
}

/// Adds a buffer: a tensor that changes without gradients.
#[track_caller]
pub(crate) fn buffer(path: &Path, name: &str, tensor: Tensor) -> Tensor {
    add(path, name, tensor, false)
}

/// Adds a tensor, and panics if the name exists: `Path::add` would store it as `name__N`, which no
/// state dict has.
#[track_caller]
fn add(path: &Path, name: &str, tensor: Tensor, trainable: bool) -> Tensor {
    assert!(
        path.get(name).is_none(),
        "`{}` is there already: each layer needs a path of its own, as `path / \"name\"`",
        path.path(name)
    );
    path.add(name, tensor, trainable)
}
