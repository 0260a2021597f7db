//! Mixed precision: operations in a smaller type, and the scale that keeps small gradients from
//! vanishing in it.
//!
//! In the book: `docs/optimizers.md#precision`.
#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use crate::error::check;
use crate::ffi::{self, IceAutocast, Pointers, pointer};
use crate::{Error, Result};

/// Autocast of this thread until the value is dropped. Operations that are safe in a smaller type
/// run in it, all others in f32, like within `torch.autocast`. Ranges may be nested, and end in
/// reverse order.
#[derive(Debug)]
#[must_use = "autocast ends when this is dropped"]
pub struct Autocast {
    before: IceAutocast,
    /// Makes the type `!Send`: the setting belongs to the thread.
    _thread: PhantomData<*const ()>,
}

impl Autocast {
    /// Begins a range for operations on one kind of device, in `Kind::Half` or `Kind::BFloat16`.
    ///
    /// # Errors
    /// `InvalidArgument` for another kind.
    pub fn begin(device: Device, kind: Kind) -> Result<Self> {
        // Numbers of `c10::ScalarType`.
        let dtype = match kind {
            Kind::Half => 5,
            Kind::BFloat16 => 15,
            other => return Err(Error::invalid(format!("autocast runs in Half or BFloat16, not {other:?}"))),
        };
        let mut before = IceAutocast::default();
        // SAFETY: the out-pointer is valid.
        check(|message| unsafe { ffi::ice_autocast_begin(device.is_cuda(), dtype, &mut before, message) })?;
        Ok(Self { before, _thread: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: this thread began the range and ends it once.
        unsafe { ffi::ice_autocast_end(self.before) }
    }
}

/// Multiplies gradients by `inverse_scale`, in place, and sets `found_inf` to 1 if a gradient is
/// not finite. Both are f32 tensors of one element on the gradients' device.
///
/// # Errors
/// `Torch` for types or devices that do not fit.
pub fn unscale(grads: &[Tensor], found_inf: &Tensor, inverse_scale: &Tensor) -> Result<()> {
    if grads.is_empty() {
        return Ok(());
    }
    let list = Pointers::of(grads);
    check(|message| {
        // SAFETY: the list and the tensors outlive the call.
        unsafe { ffi::ice_amp_unscale(list.list(), pointer(found_inf), pointer(inverse_scale), message) }
    })
}

/// Rules by which the scale of the loss follows the gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScaleUpdate {
    /// Factor of the scale after `growth_interval` finite steps in a row.
    pub growth_factor: f64,
    /// Factor of the scale after a step that is not finite.
    pub backoff_factor: f64,
    /// Number of finite steps in a row before the scale grows.
    pub growth_interval: i64,
}

/// Updates the scale, an f32 scalar, and the count of finite steps in a row, an i32 scalar, in
/// place.
///
/// # Errors
/// `Torch` for types or devices that do not fit.
pub fn update_scale(
    scale: &Tensor,
    growth_tracker: &Tensor,
    found_inf: &Tensor,
    update: &ScaleUpdate,
) -> Result<()> {
    let [scale, tracker, found] = [scale, growth_tracker, found_inf].map(pointer);
    let ScaleUpdate { growth_factor, backoff_factor, growth_interval } = *update;
    check(|message| {
        // SAFETY: the tensors outlive the call.
        unsafe {
            ffi::ice_amp_update_scale(
                scale,
                tracker,
                found,
                growth_factor,
                backoff_factor,
                growth_interval,
                message,
            )
        }
    })
}
