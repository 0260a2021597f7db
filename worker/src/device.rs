//! Binding of the one device of a rank.

use ice_proto::backend::RankDevice;
use tch::Device;

use crate::Error;

/// Loads the libraries of CUDA without binding a GPU.
pub(crate) fn load() -> Result<(), Error> {
    ice_c10d::nccl::load()
        .map_err(|error| Error::Device { device: "cuda".into(), problem: error.to_string() })
}

/// Binds the device. Loads the CUDA half of libtorch first if it is needed, since libtorch decides
/// at its first query whether it has CUDA.
pub(crate) fn bind(device: RankDevice) -> Result<Device, Error> {
    let RankDevice::Cuda(index) = device else { return Ok(Device::Cpu) };
    let fail = |problem: String| Error::Device { device: device.to_string(), problem };
    ice_c10d::nccl::load().map_err(|error| fail(error.to_string()))?;
    let count = tch::Cuda::device_count();
    if i64::from(index) >= count {
        return Err(fail(format!(
            "this process sees {count} CUDA devices: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --devices cpu"
        )));
    }
    Ok(Device::Cuda(index as usize))
}
