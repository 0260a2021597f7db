// Clients of c10d's TCPStore, and a server for the tests.
#include "shim_internal.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {

std::vector<std::string> texts(const IceStr* keys, size_t count) {
  std::vector<std::string> all;
  all.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    all.push_back(ice::text(keys[i]));
  }
  return all;
}

// Copies the bytes into memory that the caller frees with ice_bytes_free.
void hand_over(const std::vector<uint8_t>& bytes, uint8_t** value, size_t* size) {
  auto* copy = static_cast<uint8_t*>(std::malloc(bytes.size() + 1));
  if (copy == nullptr) {
    throw std::bad_alloc();
  }
  std::copy(bytes.begin(), bytes.end(), copy);
  *value = copy;
  *size = bytes.size();
}

// Turns c10d's log off, unless TORCH_CPP_LOG_LEVEL is set. c10d logs each failed attempt with a
// stack trace, and throws an error anyway: the error is enough.
void quieten() {
  static const bool once = [] {
    c10::initLogging();
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) {
      FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    }
    return true;
  }();
  static_cast<void>(once);
}

} // namespace

ICE_API int32_t ice_store_tcp(IceStr host, uint16_t port, int64_t timeout_ms, IceStore** out, char** message) {
  return ice::guarded(message, [&] {
    quieten();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = false;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    *out = new IceStore{c10::make_intrusive<c10d::TCPStore>(ice::text(host), options)};
  });
}

ICE_API int32_t ice_store_serve(IceStore** out, uint16_t* port, char** message) {
  return ice::guarded(message, [&] {
    quieten();
    c10d::TCPStoreOptions options;
    options.port = 0;
    options.isServer = true;
    options.waitWorkers = false;
    auto store = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
    *port = store->getPort();
    *out = new IceStore{std::move(store)};
  });
}

ICE_API int32_t ice_store_prefix(const IceStore* store, IceStr prefix, IceStore** out, char** message) {
  return ice::guarded(message, [&] {
    *out = new IceStore{c10::make_intrusive<c10d::PrefixStore>(ice::text(prefix), store->store)};
  });
}

ICE_API int32_t ice_store_reconnect(const IceStore* store, IceStore** out, char** message) {
  return ice::guarded(message, [&] { *out = new IceStore{store->store->clone()}; });
}

ICE_API int32_t
ice_store_set(const IceStore* store, IceStr key, const uint8_t* value, size_t size, char** message) {
  return ice::guarded(
      message, [&] { store->store->set(ice::text(key), std::vector<uint8_t>(value, value + size)); });
}

ICE_API int32_t ice_store_compare_set(
    const IceStore* store, IceStr key, IceStr expected, IceStr desired, uint8_t** value, size_t* size,
    char** message) {
  return ice::guarded(message, [&] {
    const auto bytes = [](IceStr text) { return std::vector<uint8_t>(text.data, text.data + text.size); };
    hand_over(store->store->compareSet(ice::text(key), bytes(expected), bytes(desired)), value, size);
  });
}

ICE_API int32_t ice_store_get(const IceStore* store, IceStr key, uint8_t** value, size_t* size, char** message) {
  return ice::guarded(message, [&] { hand_over(store->store->get(ice::text(key)), value, size); });
}

ICE_API int32_t ice_store_add(const IceStore* store, IceStr key, int64_t amount, int64_t* sum, char** message) {
  return ice::guarded(message, [&] { *sum = store->store->add(ice::text(key), amount); });
}

ICE_API int32_t
ice_store_check(const IceStore* store, const IceStr* keys, size_t count, bool* all, char** message) {
  return ice::guarded(message, [&] { *all = store->store->check(texts(keys, count)); });
}

ICE_API int32_t
ice_store_wait(const IceStore* store, const IceStr* keys, size_t count, int64_t timeout_ms, char** message) {
  return ice::guarded(
      message, [&] { store->store->wait(texts(keys, count), std::chrono::milliseconds(timeout_ms)); });
}

ICE_API int32_t ice_store_delete(const IceStore* store, IceStr key, bool* deleted, char** message) {
  return ice::guarded(message, [&] { *deleted = store->store->deleteKey(ice::text(key)); });
}

ICE_API void ice_store_free(IceStore* store) {
  ice::release(store);
}
