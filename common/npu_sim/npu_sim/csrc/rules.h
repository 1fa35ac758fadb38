// What torch_npu refuses although the CPU's kernel would do it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

namespace npu_sim {

// Throws if the call, whose arguments end the stack, is not allowed.
using Rule = void (*)(const c10::OperatorHandle& handle, const torch::jit::Stack& stack);

// The rule for an operator, or null.
Rule rule_for(const std::string& name);

}  // namespace npu_sim
