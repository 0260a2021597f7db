// Gloo groups, the collectives of any group, and the handles of running operations.
#include "shim_internal.h"

#include <sstream>

#include <ATen/MemoryOverlap.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

// The stub headers only imitate gloo's types. The size shows if another libtorch has a class that
// the stubs do not describe.
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "ProcessGroupGloo is not the one of libtorch 2.13.0");

namespace {

// Whether every backend can reduce elements of the type. For another type gloo would fail only in a
// thread of its own, when the other ranks already wait.
bool is_number(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
    case at::kChar:
    case at::kByte:
    case at::kInt:
    case at::kLong:
    case at::kBool:
      return true;
    default:
      return false;
  }
}

c10d::ReduceOp reduce_op(const at::Tensor& tensor, uint8_t op) {
  auto kind = static_cast<c10d::ReduceOp::RedOpType>(op);
  if (!is_number(tensor.scalar_type())) {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT,
        std::string("no backend reduces ") + c10::toString(tensor.scalar_type()) +
            " tensors: convert to another type, such as Float, Int or Long");
  }
  if (kind == c10d::ReduceOp::AVG && at::isIntegralType(tensor.scalar_type(), true)) {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT,
        std::string("an average of ") + c10::toString(tensor.scalar_type()) +
            " tensors is not a whole number: sum them and divide, or convert to a floating-point type");
  }
  if (tensor.scalar_type() == at::kBool && kind == c10d::ReduceOp::SUM) {
    // gloo would add the bytes: two ranks with true would get 2. The maximum is true if any rank
    // has true, as in NCCL's sum of bools.
    kind = c10d::ReduceOp::MAX;
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
  if (tensor.layout() != at::kStrided || tensor.is_quantized()) {
    std::ostringstream layout;
    layout << tensor.layout();
    throw ice::Failure(
        ICE_INVALID_ARGUMENT, "a " + std::string(tensor.is_quantized() ? "quantized" : layout.str()) +
            " tensor has no elements that lie in memory as its shape says: convert it to a dense one");
  }
}

// Brings tensors into the form that a backend needs: contiguous. gloo takes the address of the
// first element and the number of elements, and does not look at strides.
class Rows {
 public:
  // Returns the elements of a tensor that the operation only reads.
  at::Tensor read(const IceGroup* group, const at::Tensor& tensor) {
    on_device(group, tensor);
    return row(tensor);
  }

  // Returns a tensor to write to in place of `tensor`. If that is a copy, IceWork writes its
  // elements back.
  at::Tensor write(const IceGroup* group, const at::Tensor& tensor) {
    on_device(group, tensor);
    if (at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
      throw ice::Failure(
          ICE_INVALID_ARGUMENT,
          "elements of the tensor share memory, as those of an expanded one: write to a copy of it");
    }
    auto row = this->row(tensor);
    if (!row.is_alias_of(tensor)) {
      written_back_.emplace_back(row, tensor);
    }
    return row;
  }

  IceWork* begun(c10::intrusive_ptr<c10d::Work> work) {
    return new IceWork{std::move(work), std::move(written_back_)};
  }

 private:
  static at::Tensor row(const at::Tensor& tensor) {
    return tensor.resolve_conj().resolve_neg().contiguous();
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> written_back_;
};

// Views a row as bytes if no backend knows its type. Only operations that move elements may use
// this: they compute nothing.
at::Tensor movable(const at::Tensor& row) {
  return is_number(row.scalar_type()) ? row : row.view(-1).view(at::kByte);
}

// Checks that two tensors of a collective have the same type and shape. As rows of bytes, different
// types would pass the backend's check.
void like(const at::Tensor& own, const at::Tensor& other) {
  if (own.scalar_type() != other.scalar_type() || own.sizes() != other.sizes()) {
    std::ostringstream difference;
    difference << "one tensor is " << other.scalar_type() << " of shape " << other.sizes() << " and another "
               << own.scalar_type() << " of shape " << own.sizes() << ": they must be alike";
    throw ice::Failure(ICE_INVALID_ARGUMENT, difference.str());
  }
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
    Rows rows;
    std::vector<at::Tensor> list{rows.write(group, ice::tensor(tensor))};
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(list[0], op);
    *out = rows.begun(group->group->allreduce(list, options));
  });
}

ICE_API int32_t
ice_group_broadcast(const IceGroup* group, void* tensor, int64_t root, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    Rows rows;
    std::vector<at::Tensor> list{movable(rows.write(group, ice::tensor(tensor)))};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *out = rows.begun(group->group->broadcast(list, options));
  });
}

ICE_API int32_t
ice_group_all_gather(const IceGroup* group, IceTensors outputs, void* input, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    Rows rows;
    const auto& own = ice::tensor(input);
    std::vector<at::Tensor> inputs{movable(rows.read(group, own))};
    std::vector<std::vector<at::Tensor>> output_lists(1);
    for (const auto& output : ice::tensors(outputs)) {
      output_lists[0].push_back(movable(rows.write(group, output)));
      like(own, output);
    }
    *out = rows.begun(group->group->allgather(output_lists, inputs));
  });
}

ICE_API int32_t ice_group_reduce_scatter(
    const IceGroup* group, void* output, IceTensors inputs, uint8_t op, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    Rows rows;
    const auto& own = ice::tensor(output);
    std::vector<at::Tensor> outputs{rows.write(group, own)};
    std::vector<std::vector<at::Tensor>> input_lists(1);
    for (const auto& input : ice::tensors(inputs)) {
      input_lists[0].push_back(rows.read(group, input));
      like(own, input);
    }
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(outputs[0], op);
    *out = rows.begun(group->group->reduce_scatter(outputs, input_lists, options));
  });
}

ICE_API int32_t ice_group_send(const IceGroup* group, void* tensor, int32_t to, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    Rows rows;
    std::vector<at::Tensor> list{movable(rows.read(group, ice::tensor(tensor)))};
    *out = rows.begun(group->group->send(list, to, 0));
  });
}

ICE_API int32_t ice_group_receive(const IceGroup* group, void* tensor, int32_t from, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    Rows rows;
    std::vector<at::Tensor> list{movable(rows.write(group, ice::tensor(tensor)))};
    *out = rows.begun(group->group->recv(list, from, 0));
  });
}

ICE_API int32_t ice_group_barrier(const IceGroup* group, IceWork** out, char** message) {
  return ice::guarded(message, [&] {
    c10d::BarrierOptions options;
    options.device = group->device;
    if (group->device.has_index()) {
      options.device_ids.push_back(group->device.index());
    }
    *out = new IceWork{group->group->barrier(options), {}};
  });
}

ICE_API int32_t ice_group_abort(const IceGroup* group, char** message) {
  return ice::guarded(message, [&] {
    // Only NCCL's abort does anything; gloo's is empty.
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
    at::NoGradGuard no_grad;
    const std::lock_guard lock(work->writing);
    for (const auto& [row, tensor] : std::exchange(work->written_back, {})) {
      tensor.copy_(row);
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
