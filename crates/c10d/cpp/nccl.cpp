// NCCL groups. This file is a shared object of its own, so that a program for the CPU neither links
// nor loads libtorch's CUDA half.
#include "shim_internal.h"

#include <cstdlib>

#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

ICE_API int32_t ice_nccl_device_count(int32_t* count, char** message) {
  return ice::guarded(message, [&] { *count = c10::cuda::device_count(); });
}

ICE_API int32_t ice_group_nccl(
    const IceStore* store, int32_t rank, int32_t size, int32_t device, int64_t timeout_ms, IceGroup** out,
    char** message) {
  return ice::guarded(message, [&] {
    const int count = c10::cuda::device_count();
    if (device >= count) {
      throw ice::Failure(
          ICE_INVALID_ARGUMENT,
          "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count));
    }
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) {
      // NCCL's watchdog reports only through the log, so that warnings must stay visible.
      FLAGS_caffe2_log_level = c10::GLOG_WARNING;
    }
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store->store, rank, size, options);
    const at::Device bound(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    *out = ice::wrap(store->store, rank, size, bound, c10d::ProcessGroup::BackendType::NCCL, backend);
    (*out)->group->setBoundDeviceId(bound);
  });
}
