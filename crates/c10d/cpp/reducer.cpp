// DistributedDataParallel's reducer: averages gradients bucket by bucket while the backward pass
// runs.
#include "shim_internal.h"

#include <numeric>

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

struct IceReducer {
  std::unique_ptr<c10d::Reducer> reducer;
  std::unordered_map<const c10::TensorImpl*, int64_t> places;
  bool find_unused_parameters;
  // Whether the first backward pass of a static graph is still to come.
  bool learns_graph;
};

namespace {

// Checks on every rank that all ranks have the same parameters. c10d compares each rank with rank
// 0, and only the ranks that differ get an error: the others would wait for them in the next
// collective. The all-reduce below gives every rank the error.
void verify(const IceGroup* group, const std::vector<at::Tensor>& parameters) {
  std::string difference;
  try {
    c10d::verify_params_across_processes(group->group, parameters, std::nullopt);
  } catch (const c10::DistError&) {
    throw;
  } catch (const c10::Error& error) {
    difference = error.what_without_backtrace();
  }
  std::vector<at::Tensor> same{
      at::full({1}, difference.empty() ? 1 : 0, at::TensorOptions().dtype(at::kInt).device(group->device))};
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MIN;
  group->group->allreduce(same, options)->wait();
  if (!difference.empty()) {
    throw ice::Failure(ICE_INVALID_ARGUMENT, difference);
  }
  if (same[0].item<int>() == 0) {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT, "another rank has other parameters than this one: its own error tells which");
  }
}

} // namespace

ICE_API int32_t ice_reducer_new(
    IceTensors parameters, const IceStr* names, const IceGroup* group, IceReducerOptions options, IceReducer** out,
    char** message) {
  return ice::guarded(message, [&] {
    std::vector<at::Tensor> list = ice::tensors(parameters);
    std::unordered_map<size_t, std::string> names_by_index;
    std::unordered_map<const c10::TensorImpl*, int64_t> places;
    for (size_t i = 0; i < list.size(); ++i) {
      names_by_index[i] = ice::text(names[i]);
      places[list[i].unsafeGetTensorImpl()] = static_cast<int64_t>(i);
      if (!list[i].defined() || !list[i].requires_grad() || !list[i].is_leaf()) {
        throw ice::Failure(
            ICE_INVALID_ARGUMENT, "parameter " + names_by_index[i] + " is not a leaf that requires a gradient");
      }
    }
    verify(group, list);
    const std::vector<bool> dense(list.size(), false);
    // Gradients become ready roughly in the reverse of the order in which the forward pass uses the
    // parameters, so that the first buckets are made in that order. After the first step c10d
    // rebuilds the buckets in the order in which the gradients came. If both orders are the same,
    // each parameter stays in its place, and the sums over the ranks have the same bits before and
    // after.
    const std::vector<at::Tensor> arriving(list.rbegin(), list.rend());
    std::vector<int64_t> indices(list.size());
    std::iota(indices.rbegin(), indices.rend(), 0);
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(
        arriving, {options.first_bucket_bytes, options.bucket_cap_bytes}, dense, indices));
    auto reducer = std::make_unique<c10d::Reducer>(
        list, std::move(buckets), group->group, dense, static_cast<int64_t>(options.bucket_cap_bytes),
        options.find_unused_parameters, options.gradient_as_bucket_view, std::move(names_by_index),
        static_cast<int64_t>(options.first_bucket_bytes), false, false, std::vector<int64_t>{});
    if (options.static_graph) {
      reducer->set_static_graph();
    }
    *out = new IceReducer{std::move(reducer), std::move(places), options.find_unused_parameters, options.static_graph};
  });
}

ICE_API int32_t ice_reducer_prepare_forward(const IceReducer* reducer, char** message) {
  return ice::guarded(message, [&] { reducer->reducer->prepare_for_forward(); });
}

ICE_API int32_t ice_reducer_regroup(const IceReducer* reducer, bool* regrouped, char** message) {
  return ice::guarded(message, [&] { *regrouped = reducer->reducer->rebuild_buckets(); });
}

ICE_API int32_t ice_reducer_order(const IceReducer* reducer, int64_t* places, size_t count, char** message) {
  return ice::guarded(message, [&] {
    size_t next = 0;
    for (const auto& bucket : reducer->reducer->get_grad_buckets(false)) {
      for (const at::Tensor& parameter : bucket.getParameters()) {
        if (next == count) {
          throw ice::Failure(ICE_INVALID_ARGUMENT, "there are more parameters in the buckets than the reducer was made for");
        }
        places[next++] = reducer->places.at(parameter.unsafeGetTensorImpl());
      }
    }
    if (next != count) {
      throw ice::Failure(ICE_INVALID_ARGUMENT, "there are fewer parameters in the buckets than the reducer was made for");
    }
  });
}

ICE_API int32_t ice_reducer_prepare_backward(IceReducer* reducer, IceTensors outputs, char** message) {
  return ice::guarded(message, [&] {
    if (reducer->learns_graph) {
      reducer->learns_graph = false;
      // In a static graph, c10d learns in the first backward pass which parameters are used: all
      // are reduced at the end of that pass. queue_callback works only while a backward pass runs,
      // so that a hook of the first output calls it.
      ice::tensors(outputs).at(0).register_hook([inner = reducer->reducer.get()](const at::Tensor&) {
        torch::autograd::Engine::get_default_engine().queue_callback([inner] { inner->delay_all_reduce(); });
      });
    }
    reducer->reducer->prepare_for_backward(
        reducer->find_unused_parameters ? ice::tensors(outputs) : std::vector<at::Tensor>{});
  });
}

ICE_API void ice_reducer_free(IceReducer* reducer) {
  ice::release(reducer);
}

ICE_API int32_t ice_run_backward(void* tensor, char** message) {
  return ice::guarded(message, [&] { ice::tensor(tensor).backward(); });
}
