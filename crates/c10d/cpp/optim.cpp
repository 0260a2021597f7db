// Optimizer steps over lists of tensors, in place, and the scaling and clipping of gradients before
// them.
#include "shim_internal.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_sqrt.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

ICE_API int32_t ice_fused_adam(
    IceTensors parameters, IceTensors gradients, IceTensors exp_avgs, IceTensors exp_avg_sqs,
    IceTensors max_exp_avg_sqs, IceTensors steps, IceAdam options, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    const auto step = [&](auto kernel) {
      kernel(
          ice::tensors(parameters), ice::tensors(gradients), ice::tensors(exp_avgs), ice::tensors(exp_avg_sqs),
          ice::tensors(max_exp_avg_sqs), ice::tensors(steps));
    };
    const auto& o = options;
    if (o.decoupled) {
      step([&](auto&&... lists) {
        at::_fused_adamw_(
            lists..., o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, o.amsgrad, o.maximize);
      });
    } else {
      step([&](auto&&... lists) {
        at::_fused_adam_(lists..., o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, o.amsgrad, o.maximize);
      });
    }
  });
}

ICE_API int32_t ice_fused_sgd(
    IceTensors parameters, IceTensors gradients, IceTensors momentum_buffers, IceSgd options, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    at::_fused_sgd_(
        ice::tensors(parameters), ice::tensors(gradients), ice::tensors(momentum_buffers), options.weight_decay,
        options.momentum, options.lr, options.dampening, options.nesterov, options.maximize,
        options.is_first_step);
  });
}

// libtorch has no fused kernel for RMSprop. This is the formula over whole lists, in the order of
// torch.optim.RMSprop(foreach=True).
ICE_API int32_t ice_foreach_rmsprop(
    IceTensors parameters, IceTensors gradients, IceTensors square_avgs, IceTensors grad_avgs,
    IceTensors momentum_buffers, IceRmsprop options, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    const auto p = ice::tensors(parameters);
    auto g = ice::tensors(gradients);
    const auto square_avg = ice::tensors(square_avgs);
    if (options.weight_decay != 0) {
      g = at::_foreach_add(g, p, options.weight_decay);
    }
    at::_foreach_mul_(square_avg, options.alpha);
    at::_foreach_addcmul_(square_avg, g, g, 1 - options.alpha);
    std::vector<at::Tensor> average;
    if (grad_avgs.size > 0) {
      const auto grad_avg = ice::tensors(grad_avgs);
      at::_foreach_mul_(grad_avg, options.alpha);
      at::_foreach_add_(grad_avg, g, 1 - options.alpha);
      average = at::_foreach_addcmul(square_avg, grad_avg, grad_avg, -1);
      at::_foreach_sqrt_(average);
    } else {
      average = at::_foreach_sqrt(square_avg);
    }
    at::_foreach_add_(average, options.eps);
    if (momentum_buffers.size > 0) {
      const auto buffer = ice::tensors(momentum_buffers);
      at::_foreach_mul_(buffer, options.momentum);
      at::_foreach_addcdiv_(buffer, g, average, 1);
      at::_foreach_add_(p, buffer, -options.lr);
    } else {
      at::_foreach_addcdiv_(p, g, average, -options.lr);
    }
  });
}

ICE_API int32_t ice_clear_gradients(IceTensors parameters, char** message) {
  return ice::guarded(message, [&] {
    for (size_t i = 0; i < parameters.size; ++i) {
      ice::tensor(parameters.data[i]).mutable_grad().reset();
    }
  });
}

ICE_API int32_t ice_scale(IceTensors list, double factor, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(ice::tensors(list), factor);
  });
}

ICE_API int32_t ice_clip_norm(IceTensors list, double max_norm, void* norm, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    const auto gradients = ice::tensors(list);
    const auto total = at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients, 2)), 2);
    // As in torch.nn.utils.clip_grad_norm_, the factor is always applied: a comparison on the host
    // would wait for the norm.
    const auto factor = (max_norm / (total + 1e-6)).clamp_max(1.0);
    at::_foreach_mul_(gradients, factor);
    ice::tensor(norm).copy_(total);
  });
}
