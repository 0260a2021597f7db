// Mixed precision: autocast, and the unscaling of gradients with the update of the loss scale.
#include "shim_internal.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>

ICE_API int32_t ice_autocast_begin(bool cuda, int8_t dtype, IceAutocast* before, char** message) {
  return ice::guarded(message, [&] {
    const auto device = cuda ? at::kCUDA : at::kCPU;
    *before = {
        cuda, at::autocast::is_autocast_enabled(device),
        static_cast<int8_t>(at::autocast::get_autocast_dtype(device))};
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(dtype));
    at::autocast::increment_nesting();
  });
}

ICE_API void ice_autocast_end(IceAutocast before) {
  try {
    // The cache of cast parameters lives until the outermost range ends: the optimizer then changes
    // the parameters.
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
    const auto device = before.cuda ? at::kCUDA : at::kCPU;
    at::autocast::set_autocast_enabled(device, before.enabled);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(before.dtype));
  } catch (...) {
  }
}

ICE_API int32_t ice_amp_unscale(IceTensors gradients, void* found_inf, void* inverse_scale, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    const auto list = ice::tensors(gradients);
    at::_amp_foreach_non_finite_check_and_unscale_(list, ice::tensor(found_inf), ice::tensor(inverse_scale));
  });
}

ICE_API int32_t ice_amp_update_scale(
    void* scale, void* growth_tracker, void* found_inf, double growth_factor, double backoff_factor,
    int64_t growth_interval, char** message) {
  return ice::guarded(message, [&] {
    at::NoGradGuard no_grad;
    at::_amp_update_scale_(
        ice::tensor(scale), ice::tensor(growth_tracker), ice::tensor(found_inf), growth_factor, backoff_factor,
        growth_interval);
  });
}
