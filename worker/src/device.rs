//! One device per rank.

use ice_proto::backend::RankDevice;
use tch::Device;

use crate::Error;

/// Loads what CUDA takes, and binds no GPU yet.
pub(crate) fn load() -> Result<(), Error> {
    ice_c10d::nccl::load()
        .map_err(|error| Error::Device { device: "cuda".into(), problem: error.to_string() })
}

/// Binds the device, loading the CUDA half first where it is needed: libtorch settles whether it has CUDA at the first
/// call that asks.
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
