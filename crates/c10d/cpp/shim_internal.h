// Shared by the translation units of the shim: the handles, and the guard that turns exceptions
// into kinds.
#pragma once

#include "shim.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

struct IceStore {
  c10::intrusive_ptr<c10d::Store> store;
};

struct IceGroup {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  c10::Device device;
};

struct IceWork {
  c10::intrusive_ptr<c10d::Work> work;
  // Pairs of a contiguous copy, which took part in the operation, and the tensor that it stands
  // for. The first wait that succeeds writes the elements of each copy back.
  mutable std::vector<std::pair<at::Tensor, at::Tensor>> written_back;
  // Guards written_back: two threads may wait for the same work.
  mutable std::mutex writing{};
};

namespace ice {

// An error that the shim itself finds.
struct Failure : std::runtime_error {
  Failure(IceKind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
  IceKind kind;
};

// Translates the exception being handled into a kind, and copies its message.
int32_t translate(char** message) noexcept;

template <class Body>
int32_t guarded(char** message, Body&& body) noexcept {
  try {
    body();
    return ICE_OK;
  } catch (...) {
    return translate(message);
  }
}

// Frees a handle. An exception of its destructor is dropped: the handle is gone, and no caller
// could act on it.
template <class Handle>
void release(Handle* handle) noexcept {
  try {
    delete handle;
  } catch (...) {
  }
}

inline std::string text(IceStr text) {
  return {text.data, text.size};
}

inline at::Tensor& tensor(void* pointer) {
  return *static_cast<at::Tensor*>(pointer);
}

inline std::vector<at::Tensor> tensors(IceTensors list) {
  std::vector<at::Tensor> all;
  all.reserve(list.size);
  for (size_t i = 0; i < list.size; ++i) {
    all.push_back(tensor(list.data[i]));
  }
  return all;
}

// Wraps a backend in a ProcessGroup, as torch.distributed does: c10d's reducer takes nothing else.
inline IceGroup* wrap(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, c10::Device device,
    c10d::ProcessGroup::BackendType type, const c10::intrusive_ptr<c10d::Backend>& backend) {
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
  group->setDefaultBackend(type);
  group->setBackend(device.type(), type, backend);
  group->setGroupName("ice");
  return new IceGroup{std::move(group), device};
}

} // namespace ice
