//! Gradients that a node has made by its own backward passes.
//!
//! The reducer averages while one backward pass is running, and counts each parameter once. A node
//! that runs backward itself may do so several times, or not at all. Its gradients are therefore
//! averaged after all passes.

use ice_c10d::optim::clear_gradients;
use ice_worker::Worker;
use tch::Tensor;

use super::flat::{buckets, flatten, unflatten};
use crate::Result;

/// Sums of the passes of a step so far, by parameter.
#[derive(Default)]
pub(super) struct Collected(Vec<Option<Tensor>>);

impl Collected {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds the gradients of a pass, multiplied by a factor. After the last pass the parameters
    /// hold the sums.
    pub(super) fn add(&mut self, parameters: &[Tensor], factor: f64, last: bool) -> Result<()> {
        if last && self.0.is_empty() && factor == 1.0 {
            return Ok(());
        }
        self.0.resize_with(parameters.len(), || None);
        for (sum, parameter) in self.0.iter_mut().zip(parameters) {
            let gradient = parameter.grad();
            if gradient.defined() {
                let gradient = gradient.f_detach()?.f_mul_scalar(factor)?;
                *sum = Some(match sum.take() {
                    Some(before) => before.f_add(&gradient)?,
                    None => gradient,
                });
            }
        }
        if !last {
            return Ok(clear_gradients(parameters)?);
        }
        for (sum, parameter) in self.0.drain(..).zip(parameters) {
            if let Some(sum) = sum {
                gradient_of(parameter)?.f_copy_(&sum)?;
            }
        }
        Ok(())
    }

    /// Averages the gradients of all ranks. A parameter with a gradient on any rank gets one on all
    /// ranks. Collective.
    pub(super) fn average(&self, parameters: &[Tensor], worker: &Worker) -> Result<()> {
        if worker.world_size() == 1 || parameters.is_empty() {
            return Ok(());
        }
        let own: Vec<_> = parameters.iter().map(|parameter| i64::from(parameter.grad().defined())).collect();
        let there = Tensor::f_from_slice(&own)?.f_to_device(worker.device())?;
        worker.all_reduce_sum(&there)?;
        let there = Vec::<i64>::try_from(there.f_to_device(tch::Device::Cpu)?)?;
        let mut gradients = Vec::new();
        for (parameter, _) in parameters.iter().zip(there).filter(|(_, ranks)| *ranks > 0) {
            gradients.push(gradient_of(parameter)?);
        }
        for bucket in buckets(&gradients) {
            let mut row = flatten(bucket)?;
            worker.all_reduce_sum(&row)?;
            let _ = row.f_div_scalar_(worker.world_size() as i64)?;
            unflatten(&row, bucket)?;
        }
        Ok(())
    }
}

/// Returns the gradient of a parameter. Creates zeros if it has none.
fn gradient_of(parameter: &Tensor) -> Result<Tensor> {
    if !parameter.grad().defined() {
        // Only a backward pass can create a gradient.
        tch::with_grad(|| parameter.f_zeros_like()?.f_mul(parameter)?.f_sum(parameter.kind())?.f_backward())?;
    }
    Ok(parameter.grad())
}
