// Gloo groups, the collectives of any group, and the handles of operations under way.
#include "shim_internal.h"

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

// The stub headers hide gloo's own types; this notices a libtorch whose class they no longer describe.
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "ProcessGroupGloo is not the one of libtorch 2.13.0");

namespace {

c10d::ReduceOp reduce_op(const IceGroup* group, const at::Tensor& tensor, uint8_t op) {
  const auto kind = static_cast<c10d::ReduceOp::RedOpType>(op);
  if (kind == c10d::ReduceOp::AVG && at::isIntegralType(tensor.scalar_type(), true)) {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT,
        std::string("an average of ") + c10::toString(tensor.scalar_type()) +
            " tensors is not a whole number: sum them and divide, or convert to a floating-point type");
  }
  return kind;
}

void on_device(const IceGroup* group, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    throw ice::Failure(ICE_INVALID_ARGUMENT, "the tensor is undefined");
  }
  if (tensor.device().type() != group->device.type()) {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT, "the tensor is on " + tensor.device().str() + " but the group works on " +
            c10::DeviceTypeName(group->device.type(), true) + " tensors");
  }
}

// What is sent or received as it lies in memory.
std::vector<at::Tensor> in_a_row(const IceGroup* group, const at::Tensor& tensor) {
  on_device(group, tensor);
  if (!tensor.is_contiguous()) {
    throw ice::Failure(ICE_INVALID_ARGUMENT, "the elements of the tensor do not lie in a row: send a copy");
  }
  return {tensor};
}

} // namespace

ICE_API int32_t ice_group_gloo(
    const IceStore* store, int32_t rank, int32_t size, int64_t timeout_ms, IceStr interface, IceStr hostname,
    IceGroup** out, char** message) {
  return ice::guarded(message, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
    if (interface.data != nullptr) {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(ice::text(interface)));
    } else if (hostname.data != nullptr) {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(ice::text(hostname)));
    } else {
      options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
    }
    auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(store->store, rank, size, options);
    *out = ice::wrap(
        store->store, rank, size, at::Device(at::kCPU), c10d::ProcessGroup::BackendType::GLOO, backend);
  });
}

ICE_API int32_t
ice_group_all_reduce(const IceGroup* group, void* tensor, uint8_t op, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> list{ice::tensor(tensor)};
    on_device(group, list[0]);
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(group, list[0], op);
    *out = new IceWork{group->group->allreduce(list, options)};
  });
}

ICE_API int32_t
ice_group_broadcast(const IceGroup* group, void* tensor, int64_t root, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> list{ice::tensor(tensor)};
    on_device(group, list[0]);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *out = new IceWork{group->group->broadcast(list, options)};
  });
}

ICE_API int32_t
ice_group_all_gather(const IceGroup* group, IceTensors outputs, void* input, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<std::vector<at::Tensor>> output_lists{ice::tensors(outputs)};
    std::vector<at::Tensor> inputs{ice::tensor(input)};
    on_device(group, inputs[0]);
    *out = new IceWork{group->group->allgather(output_lists, inputs)};
  });
}

ICE_API int32_t ice_group_reduce_scatter(
    const IceGroup* group, void* output, IceTensors inputs, uint8_t op, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> outputs{ice::tensor(output)};
    std::vector<std::vector<at::Tensor>> input_lists{ice::tensors(inputs)};
    on_device(group, outputs[0]);
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(group, outputs[0], op);
    *out = new IceWork{group->group->reduce_scatter(outputs, input_lists, options)};
  });
}

ICE_API int32_t ice_group_send(const IceGroup* group, void* tensor, int32_t to, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    auto list = in_a_row(group, ice::tensor(tensor));
    *out = new IceWork{group->group->send(list, to, 0)};
  });
}

ICE_API int32_t ice_group_receive(const IceGroup* group, void* tensor, int32_t from, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    auto list = in_a_row(group, ice::tensor(tensor));
    *out = new IceWork{group->group->recv(list, from, 0)};
  });
}

ICE_API int32_t ice_group_barrier(const IceGroup* group, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    c10d::BarrierOptions options;
    options.device = group->device;
    if (group->device.has_index()) {
      options.device_ids.push_back(group->device.index());
    }
    *out = new IceWork{group->group->barrier(options)};
  });
}

ICE_API int32_t ice_group_abort(const IceGroup* group, char** message) {
  return ice::guarded(message, [&] {
    // Gloo's does nothing.
    if (group->device.is_cuda()) {
      group->group->getDefaultBackend()->abort();
    }
  });
}

ICE_API void ice_group_free(IceGroup* group) {
  ice::release(group);
}

ICE_API int32_t ice_work_wait(const IceWork* work, int64_t timeout_ms, char** message) {
  return ice::guarded(message, [&] {
    if (!work->work->wait(std::chrono::milliseconds(timeout_ms))) {
      throw ice::Failure(ICE_BACKEND, "the operation was aborted");
    }
  });
}

ICE_API bool ice_work_is_completed(const IceWork* work) {
  try {
    return work->work->isCompleted();
  } catch (...) {
    return true;
  }
}

ICE_API void ice_work_free(IceWork* work) {
  ice::release(work);
}
