// Fused optimizer steps over lists of tensors, in place.
#include "shim_internal.h"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>

ICE_API int32_t ice_fused_adamw(
    IceTensors parameters, IceTensors gradients, IceTensors exp_avgs, IceTensors exp_avg_sqs, IceTensors steps,
    IceAdamW options, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    at::_fused_adamw_(
        ice::tensors(parameters), ice::tensors(gradients), ice::tensors(exp_avgs), ice::tensors(exp_avg_sqs), {},
        ice::tensors(steps), options.lr, options.beta1, options.beta2, options.weight_decay, options.eps,
        /*amsgrad=*/false, options.maximize);
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
