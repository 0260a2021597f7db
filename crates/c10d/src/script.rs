//! Modules in TorchScript, which Python programs save with `torch.jit.script(module).save(path)`.
#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::ffi::c_void;
use std::path::Path;

use tch::{Device, Tensor};

use crate::error::check;
use crate::ffi::{self, Handle, IceScript, IceStr, Pointers, take_string};
use crate::{Error, Result};

/// A TorchScript module with its parameters and buffers.
#[derive(Debug)]
pub struct ScriptModule {
    handle: Handle<IceScript>,
    parameters: Vec<(String, Tensor)>,
    buffers: Vec<(String, Tensor)>,
}

impl ScriptModule {
    /// Loads a module onto a device.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that is neither the CPU nor a CUDA GPU, `Torch` if the file
    /// is not a TorchScript module.
    pub fn load(path: &Path, device: Device) -> Result<Self> {
        let cuda_device = match device {
            Device::Cpu => -1,
            Device::Cuda(index) => i32::try_from(index).unwrap_or(i32::MAX),
            other => {
                return Err(Error::invalid(format!(
                    "TorchScript modules run on CPU and CUDA, not on {other:?}"
                )));
            }
        };
        let path = path.to_string_lossy();
        let handle = Handle::make(|out, message| {
            // SAFETY: the path outlives the call, the out-pointers are valid.
            unsafe { ffi::ice_script_load(IceStr::new(&path), cuda_device, out, message) }
        })?;
        let (parameters, buffers) = (tensors(&handle, false)?, tensors(&handle, true)?);
        Ok(Self { handle, parameters, buffers })
    }

    /// Returns the parameters under PyTorch's names. They share memory with the module. A tensor
    /// with two names appears twice.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Returns the buffers under PyTorch's names, such as the statistics of a batch norm. They
    /// share memory with the module.
    pub fn buffers(&self) -> &[(String, Tensor)] {
        &self.buffers
    }

    /// Whether a batch norm or a dropout in `forward` always has the same mode, like in a traced
    /// module.
    ///
    /// # Errors
    /// The module has no `forward`.
    pub fn has_fixed_mode(&self) -> Result<bool> {
        let mut fixed = false;
        // SAFETY: the module is alive, the out-pointers are valid.
        check(|message| unsafe {
            ffi::ice_script_has_fixed_mode(self.handle.pointer(), &mut fixed, message)
        })?;
        Ok(fixed)
    }

    /// Runs `forward` in training or evaluation mode, and returns its tensors: one, or those of a
    /// tuple or list in order.
    ///
    /// The graph runs as it is, without the optimizer of TorchScript's executor.
    ///
    /// # Errors
    /// `Torch` for the failure of an operation, `InvalidArgument` if the result contains anything
    /// other than tensors.
    pub fn forward(&mut self, inputs: &[Tensor], train: bool) -> Result<Vec<Tensor>> {
        let inputs = Pointers::of(inputs);
        let script = self.handle.pointer_mut();
        let mut count = 0;
        // SAFETY: the module and the inputs are alive, no other thread runs the module, the
        // out-pointers are valid.
        check(|message| unsafe {
            ffi::ice_script_forward(script, inputs.list(), train, &mut count, message)
        })?;
        let output = |index| {
            let mut tensor = std::ptr::null_mut();
            // SAFETY: as above; each output is taken once.
            check(|message| unsafe { ffi::ice_script_output(script, index, &mut tensor, message) })?;
            own(tensor)
        };
        (0..count).map(output).collect()
    }
}

fn tensors(handle: &Handle<IceScript>, buffers: bool) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    loop {
        let (mut name, mut tensor) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the module is alive, the out-pointers are valid.
        check(|message| unsafe {
            ffi::ice_script_tensor(handle.pointer(), buffers, all.len(), &mut name, &mut tensor, message)
        })?;
        match take_string(name) {
            Some(name) => all.push((name, own(tensor)?)),
            None => return Ok(all),
        }
    }
}

/// Takes ownership of an `at::Tensor*` of the shim.
fn own(tensor: *mut c_void) -> Result<Tensor> {
    if tensor.is_null() {
        return Err(Error::new(crate::ErrorKind::Other, "the shim returned no tensor"));
    }
    // SAFETY: the shim created it with new, like tch, and passed on its ownership.
    Ok(unsafe { Tensor::from_ptr(tensor.cast()) })
}
