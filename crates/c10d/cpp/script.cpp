// TorchScript modules: their tensors by PyTorch's names, and their forward pass.
#include "shim_internal.h"

#include <cstring>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

// A parameter or buffer, with the attribute of the module that holds it.
struct Slot {
  std::string name;
  c10::intrusive_ptr<c10::ivalue::Object> owner;
  size_t index;
  at::Tensor tensor;
};

struct IceScript {
  torch::jit::Module module;
  std::vector<Slot> parameters{}, buffers{};
  // The outputs of the last forward pass that ice_script_output has not moved out yet.
  std::vector<at::Tensor> outputs{};
};

namespace {

void collect(IceScript& script) {
  for (const auto& [name, module] : script.module.named_modules()) {
    const auto& owner = module._ivalue();
    const auto type = module.type();
    for (size_t i = 0; i < type->numAttributes(); ++i) {
      // A layer without a bias has None in the place of the bias.
      if (!owner->getSlot(i).isTensor() || !(type->is_parameter(i) || type->is_buffer(i))) {
        continue;
      }
      const auto prefix = name.empty() ? std::string{} : name + ".";
      auto& into = type->is_parameter(i) ? script.parameters : script.buffers;
      into.push_back({prefix + type->getAttributeName(i), owner, i, owner->getSlot(i).toTensor()});
    }
  }
}

// Puts the original tensor of each buffer back. A forward pass may assign another tensor to a
// buffer, but callers hold the original: it gets the new values.
void keep_buffers(IceScript& script) {
  const at::NoGradGuard no_grad;
  for (auto& slot : script.buffers) {
    const auto& now = slot.owner->getSlot(slot.index);
    if (!now.isTensor() || now.toTensor().sizes() != slot.tensor.sizes() ||
        now.toTensor().scalar_type() != slot.tensor.scalar_type()) {
      throw ice::Failure(
          ICE_INVALID_ARGUMENT, "forward gives the buffer `" + slot.name + "` another shape or type: buffers must keep theirs");
    }
    if (!now.toTensor().is_same(slot.tensor)) {
      slot.tensor.copy_(now.toTensor());
      slot.owner->setSlot(slot.index, slot.tensor);
    }
  }
}

void flatten(const c10::IValue& value, std::vector<at::Tensor>& into) {
  if (value.isTensor()) {
    into.push_back(value.toTensor());
  } else if (value.isTuple()) {
    for (const auto& element : value.toTupleRef().elements()) {
      flatten(element, into);
    }
  } else if (value.isTensorList()) {
    for (const at::Tensor& element : value.toTensorVector()) {
      into.push_back(element);
    }
  } else {
    throw ice::Failure(
        ICE_INVALID_ARGUMENT, "forward returns `" + value.type()->str() + "`: let it return tensors, in a tuple or a list");
  }
}

// Whether a batch norm or a dropout in the block has its mode as a constant: tracing leaves such
// constants behind.
bool has_fixed_mode(torch::jit::Block* block) {
  for (torch::jit::Node* node : block->nodes()) {
    const bool norm = node->kind() == c10::aten::batch_norm, dropout = node->kind() == c10::aten::dropout;
    const size_t mode = norm ? 5 : 2;
    if ((norm || dropout) && node->input(mode)->node()->kind() == c10::prim::Constant) {
      return true;
    }
    for (torch::jit::Block* inner : node->blocks()) {
      if (has_fixed_mode(inner)) {
        return true;
      }
    }
  }
  return false;
}

}  // namespace

ICE_API int32_t ice_script_load(IceStr path, int32_t cuda_device, IceScript** out, char** message) {
  return ice::guarded(message, [&] {
    const auto device = cuda_device < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, static_cast<int8_t>(cuda_device));
    auto script = std::make_unique<IceScript>(IceScript{torch::jit::load(ice::text(path), device)});
    collect(*script);
    *out = script.release();
  });
}

ICE_API int32_t ice_script_tensor(
    const IceScript* script, bool buffer, size_t index, char** name, void** tensor, char** message) {
  return ice::guarded(message, [&] {
    const auto& all = buffer ? script->buffers : script->parameters;
    if (index >= all.size()) {
      return;
    }
    auto copy = std::make_unique<at::Tensor>(all[index].tensor);
    *name = strdup(all[index].name.c_str());
    *tensor = copy.release();
  });
}

ICE_API int32_t ice_script_has_fixed_mode(const IceScript* script, bool* fixed, char** message) {
  return ice::guarded(message, [&] {
    const auto graph = script->module.get_method("forward").graph()->copy();
    torch::jit::Inline(*graph);
    *fixed = has_fixed_mode(graph->block());
  });
}

ICE_API int32_t
ice_script_forward(IceScript* script, IceTensors inputs, bool train, size_t* count, char** message) {
  return ice::guarded(message, [&] {
    if (script->module.is_training() != train) {
      script->module.train(train);
    }
    // After its first passes, the optimizer of graphs compiles other kernels, whose last bits
    // differ. A resumed process would count its passes from the start again, and would differ from
    // a run without interruption.
    const torch::jit::GraphOptimizerEnabledGuard unoptimized(false);
    const auto tensors = ice::tensors(inputs);
    std::vector<c10::IValue> arguments(tensors.begin(), tensors.end());
    script->outputs.clear();
    flatten(script->module.forward(std::move(arguments)), script->outputs);
    keep_buffers(*script);
    *count = script->outputs.size();
  });
}

ICE_API int32_t ice_script_output(IceScript* script, size_t index, void** tensor, char** message) {
  return ice::guarded(message, [&] { *tensor = new at::Tensor(std::move(script->outputs.at(index))); });
}

ICE_API void ice_script_free(IceScript* script) {
  ice::release(script);
}
