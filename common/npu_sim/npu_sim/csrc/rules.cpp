#include "rules.h"

#include <ATen/core/Tensor.h>

namespace npu_sim {
namespace {

using c10::OperatorHandle;
using torch::jit::Stack;

const c10::IValue& argument(const OperatorHandle& handle, const Stack& stack, const char* name) {
  const auto& schema = handle.schema();
  const auto index = schema.argumentIndexWithName(name);
  TORCH_INTERNAL_ASSERT(index, name, " is no argument of ", schema);
  return stack[stack.size() - schema.arguments().size() + static_cast<size_t>(*index)];
}

// torch_npu's kernels ignore both, so that a GradScaler would seem to work and scale wrongly.
void fused_optimizers_have_no_scaler(const OperatorHandle& handle, const Stack& stack) {
  for (const auto* name : {"grad_scale", "found_inf"}) {
    TORCH_CHECK(argument(handle, stack, name).isNone(), handle.schema().name(),
                " on the NPU takes no ", name, ": use the optimizer with fused=False beside a "
                "GradScaler");
  }
}

void attention_masks_are_bool(const OperatorHandle& handle, const Stack& stack) {
  const auto& mask = argument(handle, stack, "attn_mask");
  if (mask.isNone()) return;
  TORCH_CHECK(mask.toTensor().scalar_type() == at::kBool,
              "scaled_dot_product_attention on NPU takes a bool attn_mask, but got ",
              mask.toTensor().dtype());
}

}  // namespace

Rule rule_for(const std::string& name) {
  if (name == "aten::scaled_dot_product_attention") return attention_masks_are_bool;
  for (const auto* fused : {"aten::_fused_adamw_", "aten::_fused_adam_", "aten::_fused_sgd_",
                            "aten::_fused_adagrad_"}) {
    if (name == fused || name == std::string(fused) + ".tensor_lr") {
      return fused_optimizers_have_no_scaler;
    }
  }
  return nullptr;
}

}  // namespace npu_sim
