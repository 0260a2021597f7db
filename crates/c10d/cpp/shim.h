// The C interface of c10d for src/ffi.rs. Every function that can fail returns a kind (0: success).
// On failure it sets *message to a string that ice_string_free frees. No C++ exception leaves a
// function declared here.
#pragma once

#include <cstddef>
#include <cstdint>

#define ICE_API extern "C" __attribute__((visibility("default")))

// `check` in src/error.rs matches the same numbers.
enum IceKind : int32_t {
  ICE_OK = 0,
  ICE_NETWORK = 1,
  ICE_STORE = 2,
  ICE_TIMEOUT = 3,
  ICE_BACKEND = 4,
  ICE_TORCH = 5,
  ICE_NO_GPU = 6,
  ICE_UNAVAILABLE = 7,
  ICE_INVALID_ARGUMENT = 8,
  ICE_OTHER = 9,
};

struct IceStr {
  const char* data;
  size_t size;
};

// Borrowed tensors: each element is an at::Tensor*.
struct IceTensors {
  void* const* data;
  size_t size;
};

struct IceStore;
struct IceGroup;
struct IceWork;
struct IceReducer;
struct IceScript;

struct IceAdam {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, decoupled, maximize;
};

struct IceSgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, is_first_step;
};

struct IceRmsprop {
  double lr, alpha, eps, weight_decay, momentum;
};

// The settings of autocast for one kind of device before ice_autocast_begin.
struct IceAutocast {
  bool cuda, enabled;
  int8_t dtype;
};

struct IceReducerOptions {
  size_t bucket_cap_bytes, first_bucket_bytes;
  bool find_unused_parameters, gradient_as_bucket_view, static_graph;
};

ICE_API void ice_string_free(char* message);
ICE_API void ice_bytes_free(uint8_t* data);

ICE_API int32_t ice_store_tcp(IceStr host, uint16_t port, int64_t timeout_ms, IceStore** out, char** message);
ICE_API int32_t ice_store_serve(IceStore** out, uint16_t* port, char** message);
ICE_API int32_t ice_store_prefix(const IceStore* store, IceStr prefix, IceStore** out, char** message);
ICE_API int32_t ice_store_reconnect(const IceStore* store, IceStore** out, char** message);
ICE_API int32_t ice_store_set(const IceStore* store, IceStr key, const uint8_t* value, size_t size, char** message);
ICE_API int32_t ice_store_compare_set(
    const IceStore* store, IceStr key, IceStr expected, IceStr desired, uint8_t** value, size_t* size,
    char** message);
ICE_API int32_t ice_store_get(const IceStore* store, IceStr key, uint8_t** value, size_t* size, char** message);
ICE_API int32_t ice_store_add(const IceStore* store, IceStr key, int64_t amount, int64_t* sum, char** message);
ICE_API int32_t ice_store_check(const IceStore* store, const IceStr* keys, size_t count, bool* all, char** message);
ICE_API int32_t
ice_store_wait(const IceStore* store, const IceStr* keys, size_t count, int64_t timeout_ms, char** message);
ICE_API int32_t ice_store_delete(const IceStore* store, IceStr key, bool* deleted, char** message);
ICE_API void ice_store_free(IceStore* store);

// An interface or hostname whose data is null is not given. If neither is given, gloo chooses its
// default device.
ICE_API int32_t ice_group_gloo(
    const IceStore* store, int32_t rank, int32_t size, int64_t timeout_ms, IceStr interface, IceStr hostname,
    IceGroup** out, char** message);
ICE_API int32_t ice_group_all_reduce(const IceGroup* group, void* tensor, uint8_t op, IceWork** out, char** message);
ICE_API int32_t
ice_group_broadcast(const IceGroup* group, void* tensor, int64_t root, IceWork** out, char** message);
ICE_API int32_t
ice_group_all_gather(const IceGroup* group, IceTensors outputs, void* input, IceWork** out, char** message);
ICE_API int32_t ice_group_reduce_scatter(
    const IceGroup* group, void* output, IceTensors inputs, uint8_t op, IceWork** out, char** message);
ICE_API int32_t ice_group_send(const IceGroup* group, void* tensor, int32_t to, IceWork** out, char** message);
ICE_API int32_t ice_group_receive(const IceGroup* group, void* tensor, int32_t from, IceWork** out, char** message);
ICE_API int32_t ice_group_barrier(const IceGroup* group, IceWork** out, char** message);
ICE_API int32_t ice_group_abort(const IceGroup* group, char** message);
ICE_API void ice_group_free(IceGroup* group);

// A timeout of 0 means the timeout of the group.
ICE_API int32_t ice_work_wait(const IceWork* work, int64_t timeout_ms, char** message);
ICE_API bool ice_work_is_completed(const IceWork* work);
ICE_API void ice_work_free(IceWork* work);

ICE_API int32_t ice_reducer_new(
    IceTensors parameters, const IceStr* names, const IceGroup* group, IceReducerOptions options, IceReducer** out,
    char** message);
ICE_API int32_t ice_reducer_prepare_forward(const IceReducer* reducer, char** message);
ICE_API int32_t ice_reducer_regroup(const IceReducer* reducer, bool* regrouped, char** message);
ICE_API int32_t ice_reducer_order(const IceReducer* reducer, int64_t* places, size_t count, char** message);
ICE_API int32_t ice_reducer_prepare_backward(IceReducer* reducer, IceTensors outputs, char** message);
ICE_API void ice_reducer_free(IceReducer* reducer);
// weight and bias may be null. *out becomes a new at::Tensor, which the caller owns.
ICE_API int32_t ice_batch_norm(
    const IceGroup* group, void* x, void* weight, void* bias, void* mean, void* var, double count, double eps,
    void** out, char** message);
ICE_API int32_t ice_run_backward(void* tensor, char** message);

// In each step, a list that the options do not need is empty.
ICE_API int32_t ice_fused_adam(
    IceTensors parameters, IceTensors gradients, IceTensors exp_avgs, IceTensors exp_avg_sqs,
    IceTensors max_exp_avg_sqs, IceTensors steps, IceAdam options, char** message);
ICE_API int32_t ice_fused_sgd(
    IceTensors parameters, IceTensors gradients, IceTensors momentum_buffers, IceSgd options, char** message);
ICE_API int32_t ice_foreach_rmsprop(
    IceTensors parameters, IceTensors gradients, IceTensors square_avgs, IceTensors grad_avgs,
    IceTensors momentum_buffers, IceRmsprop options, char** message);
ICE_API int32_t ice_clear_gradients(IceTensors parameters, char** message);
ICE_API int32_t ice_scale(IceTensors list, double factor, char** message);
// Clips the list, and writes its norm before the clipping to the scalar `norm`.
ICE_API int32_t ice_clip_norm(IceTensors list, double max_norm, void* norm, char** message);

ICE_API int32_t ice_autocast_begin(bool cuda, int8_t dtype, IceAutocast* before, char** message);
ICE_API void ice_autocast_end(IceAutocast before);
// Sets the scalar `found_inf` to 1 if a gradient is not finite.
ICE_API int32_t ice_amp_unscale(IceTensors gradients, void* found_inf, void* inverse_scale, char** message);
ICE_API int32_t ice_amp_update_scale(
    void* scale, void* growth_tracker, void* found_inf, double growth_factor, double backoff_factor,
    int64_t growth_interval, char** message);

// A negative cuda_device means the CPU.
ICE_API int32_t ice_script_load(IceStr path, int32_t cuda_device, IceScript** out, char** message);
// Gives the tensor at `index` and its name; the caller owns both. With an index past the last
// tensor, *name and *tensor stay as they are.
ICE_API int32_t ice_script_tensor(
    const IceScript* script, bool buffer, size_t index, char** name, void** tensor, char** message);
ICE_API int32_t ice_script_has_fixed_mode(const IceScript* script, bool* fixed, char** message);
ICE_API int32_t
ice_script_forward(IceScript* script, IceTensors inputs, bool train, size_t* count, char** message);
// Moves the output at `index` of the last forward pass out to the caller, who owns *tensor.
ICE_API int32_t ice_script_output(IceScript* script, size_t index, void** tensor, char** message);
ICE_API void ice_script_free(IceScript* script);

// Functions of libice_nccl.so, which src/nccl.rs opens.
ICE_API int32_t ice_nccl_device_count(int32_t* count, char** message);
ICE_API int32_t ice_group_nccl(
    const IceStore* store, int32_t rank, int32_t size, int32_t device, int64_t timeout_ms, IceGroup** out,
    char** message);
