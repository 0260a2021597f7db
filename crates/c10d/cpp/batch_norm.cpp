// Batch norm over a batch that is spread over the ranks of a group.
#include "shim_internal.h"

#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

// Returns all dimensions of x, [n, features, ...], except that of the features.
std::vector<int64_t> all_but_features(const at::Tensor& x) {
  std::vector<int64_t> dims{0};
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    dims.push_back(dim);
  }
  return dims;
}

// Reshapes statistics of [features] so that they broadcast to x.
at::Tensor over(const at::Tensor& statistics, const at::Tensor& x) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
  shape[1] = -1;
  return statistics.view(shape);
}

struct Normalize : torch::autograd::Function<Normalize> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const std::optional<at::Tensor>& weight,
      const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var, double count, double eps,
      const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
    const auto scale = (var + eps).rsqrt();
    context->save_for_backward({x, weight.value_or(at::Tensor()), mean, scale});
    context->saved_data["count"] = count;
    context->saved_data["group"] = c10::IValue::make_capsule(group);
    // In evaluation mode native_batch_norm normalizes with the given statistics. Here they are
    // those of the batch of all ranks.
    return std::get<0>(at::native_batch_norm(x, weight, bias, mean, var, false, 0.0, eps));
  }

  // Computes the gradients. With x' = (x - mean) / sqrt(var + eps), and sums over the batch of all
  // ranks:
  //   dx = weight / sqrt(var + eps) * (dy - sum(dy) / count - x' * sum(dy * x') / count)
  // The gradients of weight and bias are those of this rank's batch alone: the reducer averages
  // them over the ranks, as it does those of all other parameters.
  static torch::autograd::variable_list
  backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &mean = saved[2], &scale = saved[3];
    const auto dims = all_but_features(x);
    const auto kind = mean.scalar_type();
    const auto dy = gradients[0].to(kind);
    const auto normalized = (x.to(kind) - over(mean, x)) * over(scale, x);
    const auto sums = at::stack({dy.sum(dims), (dy * normalized).sum(dims)});
    torch::autograd::variable_list result(8);
    if (context->needs_input_grad(1)) {
      result[1] = sums[1].to(weight.scalar_type());
    }
    if (context->needs_input_grad(2)) {
      result[2] = sums[0].clone();
    }
    if (context->needs_input_grad(0)) {
      const auto group = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroup>(context->saved_data["group"].toCapsule());
      std::vector<at::Tensor> of_all{sums.clone()};
      group->allreduce(of_all, c10d::AllreduceOptions())->wait();
      const auto means = of_all[0] / context->saved_data["count"].toDouble();
      const auto factor = weight.defined() ? scale * weight.to(kind) : scale;
      const auto dx = over(factor, x) * (dy - over(means[0], x) - normalized * over(means[1], x));
      result[0] = dx.to(x.scalar_type());
    }
    return result;
  }
};

} // namespace

ICE_API int32_t ice_batch_norm(
    const IceGroup* group, void* x, void* weight, void* bias, void* mean, void* var, double count, double eps,
    void** out, char** message) {
  return ice::guarded(message, [&] {
    const auto optional = [](void* pointer) {
      return pointer == nullptr ? std::nullopt : std::optional<at::Tensor>(ice::tensor(pointer));
    };
    const at::Tensor normalized = Normalize::apply(
        ice::tensor(x), optional(weight), optional(bias), ice::tensor(mean), ice::tensor(var), count, eps, group->group);
    *out = new at::Tensor(normalized);
  });
}
