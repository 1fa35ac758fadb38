// Every operator that the device runs goes through Operator::operator():
//
//   native         as on an NPU with a kernel for it. The work is done by the CPU's kernel on
//                  aliases of the arguments (host_alias.h), or, where the CPU has none either, by
//                  torch's decomposition, whose parts then belong to this kernel.
//   decomposed     no kernel on the NPU, but torch has a decomposition: its parts are operators
//                  of the device in turn.
//   cpu_fallback   neither: torch_npu copies the arguments to the host, and warns.
#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "device.h"
#include "host_alias.h"
#include "memory.h"
#include "record.h"
#include "rules.h"

namespace npu_sim {
namespace {

using c10::DispatchKey;
using c10::OperatorHandle;
using torch::jit::Stack;

// In the order in which torch itself looks for a kernel.
constexpr std::array kComposites = {DispatchKey::CompositeExplicitAutogradNonFunctional,
                                    DispatchKey::CompositeExplicitAutograd,
                                    DispatchKey::CompositeImplicitAutograd};

std::optional<DispatchKey> composite_of(const OperatorHandle& handle) {
  for (const auto key : kComposites) {
    if (handle.hasKernelForDispatchKey(key)) return key;
  }
  return std::nullopt;
}

// torch's decompositions of convolutions look for a backend's own kernel, which here is the CPU's
// decomposition that finds the CPU's kernel.
bool is_run_whole_on_host(const std::string& name) {
  return name == "aten::convolution" || name == "aten::convolution_backward";
}

struct Traits {
  explicit Traits(const OperatorHandle& handle)
      : needs(handle),
        on_host(handle.hasKernelForDispatchKey(DispatchKey::CPU) ||
                is_run_whole_on_host(needs.name)),
        composite(composite_of(handle)),
        rule(rule_for(needs.name)),
        size_depends_on_data(handle.hasTag(at::Tag::dynamic_output_shape)),
        reads_back(handle.hasTag(at::Tag::data_dependent_output)) {
    for (const auto& argument : handle.schema().arguments()) {
      has_indices |= argument.type()->str() == "Tensor?[]";
    }
  }

  Way way() const {
    if (native.load(std::memory_order_relaxed)) return Way::kNative;
    return composite ? Way::kDecomposed : Way::kCpuFallback;
  }

  const host_alias::OperatorNeeds needs;
  const bool on_host;
  const std::optional<DispatchKey> composite;
  const Rule rule;  // null: none
  const bool size_depends_on_data;
  const bool reads_back;
  bool has_indices = false;
  std::atomic<bool> native{true};
  std::atomic<bool> has_warned{false};
};

// Traits by name; they are made once and never destroyed.
class Registry {
 public:
  Traits& traits_of(const OperatorHandle& handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& traits = traits_[handle.operator_name()];
    if (!traits) {
      traits = std::make_unique<Traits>(handle);
      traits->native = is_native(traits->needs.name);
    }
    return *traits;
  }

  void set_native(std::optional<OperatorNames> names) {
    std::lock_guard<std::mutex> lock(mutex_);
    native_ = std::move(names);
    for (auto& [name, traits] : traits_) {
      traits->native = is_native(traits->needs.name);
      traits->has_warned = false;
    }
  }

 private:
  bool is_native(const std::string& name) const { return !native_ || native_->contains(name); }

  std::mutex mutex_;
  std::optional<OperatorNames> native_;
  std::unordered_map<c10::OperatorName, std::unique_ptr<Traits>> traits_;
};

Registry& registry() {
  static auto* operators = new Registry();
  return *operators;
}

void (*warner)(const std::string& message) = [](const std::string& message) {
  TORCH_WARN(message);
};

bool is_set(const char* variable, const char* value) {
  const auto* text = std::getenv(variable);
  return text && std::strcmp(text, value) == 0;
}

void announce_fallback(Traits& traits) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_set("TORCH_NPU_FALLBACK_CPU_DISABLE", "1") && !is_set("NPU_SIM_FALLBACK", "error"),
      "The operator '", traits.needs.name, "' has no kernel on the NPU, but CPU fallback is "
      "disabled by TORCH_NPU_FALLBACK_CPU_DISABLE=1.");
  if (traits.has_warned.exchange(true)) return;
  warner(c10::str("CAUTION: The operator '", traits.needs.name, "' is not currently supported on "
                  "the NPU backend and will fall back to run on the CPU. This may have performance "
                  "implications."));
}

// A mask as an index is turned into numbers of elements, as many as are true.
bool has_mask(const Stack& stack, size_t arguments) {
  for (auto i = stack.size() - arguments; i < stack.size(); i++) {
    if (!stack[i].isOptionalTensorList()) continue;
    for (const std::optional<at::Tensor> index : stack[i].toOptionalTensorList()) {
      if (!index || !index->defined()) continue;
      if (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte) return true;
    }
  }
  return false;
}

// Indices on the host are copied to the device first.
void record_index_copies(const Stack& stack, size_t arguments) {
  for (auto i = stack.size() - arguments; i < stack.size(); i++) {
    if (!stack[i].isOptionalTensorList()) continue;
    for (const std::optional<at::Tensor> index : stack[i].toOptionalTensorList()) {
      if (!index || !index->defined() || !index->device().is_cpu()) continue;
      record_copy("host_to_device", *index, /*non_blocking=*/false);
      record_sync("copy");
    }
  }
}

// What torch_npu copies to the host before, and back after, where the device has no kernel.
void record_fallback_copies(const char* kind, const Stack& stack, size_t count) {
  for (auto i = stack.size() - count; i < stack.size(); i++) {
    if (stack[i].isTensor() && stack[i].toTensor().defined()) {
      record_copy(kind, stack[i].toTensor(), /*non_blocking=*/false);
    } else if (stack[i].isTensorList()) {
      for (const auto& tensor : stack[i].toTensorVector()) record_copy(kind, tensor, false);
    }
  }
  record_sync("copy");
}

// Some operators can be told the size that they would else read off the data.
bool is_told_size(const OperatorHandle& handle, const Stack& stack) {
  const auto& schema = handle.schema();
  for (const auto* name : {"num_classes", "output_size"}) {
    const auto index = schema.argumentIndexWithName(name);
    if (!index) continue;
    const auto& size = stack[stack.size() - schema.arguments().size() + *index];
    if (size.isInt() && size.toInt() >= 0) return true;
  }
  return false;
}

void record_waits(const OperatorHandle& handle, const Traits& traits, Way way,
                  const Stack& stack) {
  if (way == Way::kCpuFallback) {
    record_fallback_copies("device_to_host", stack, traits.needs.arguments);
  }
  if (traits.reads_back) record_sync("item");
  if (traits.has_indices) {
    record_index_copies(stack, traits.needs.arguments);
    if (has_mask(stack, traits.needs.arguments)) record_sync("data_dependent");
  } else if (traits.size_depends_on_data && !is_told_size(handle, stack)) {
    record_sync("data_dependent");
  }
}

void run_composite(const OperatorHandle& handle, const Traits& traits, Stack* stack) {
  handle.callBoxedForDispatchKey(*traits.composite, *stack);
}

void run_as_kernel(const OperatorHandle& handle, const Traits& traits, Stack* stack) {
  if (traits.on_host) {
    host_alias::run_on_host(handle, traits.needs, *stack, adopting_memory());
    return;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      traits.composite, "the simulated NPU cannot run the operator '", traits.needs.name,
      "': torch has neither a CPU kernel nor a decomposition of it");
  run_composite(handle, traits, stack);
}

void run(const OperatorHandle& handle, Traits& traits, Stack* stack) {
  require_card();
  if (OperatorScope::is_inside_kernel()) return run_as_kernel(handle, traits, stack);
  if (traits.rule) traits.rule(handle, *stack);
  const auto way = traits.way();
  if (way == Way::kCpuFallback) announce_fallback(traits);
  OperatorScope scope(traits.needs.name, way);
  if (is_recording()) {
    scope.inputs(*stack, traits.needs.arguments);
    record_waits(handle, traits, way, *stack);
  }
  if (way == Way::kDecomposed) {
    run_composite(handle, traits, stack);
  } else {
    run_as_kernel(handle, traits, stack);
  }
  scope.outputs(*stack, traits.needs.results);
  if (way == Way::kCpuFallback && is_recording()) {
    record_fallback_copies("host_to_device", *stack, traits.needs.results);
  }
}

class Operator final : public c10::OperatorKernel {
 public:
  explicit Operator(Traits& traits) : traits_(traits) {}
  void operator()(const OperatorHandle& handle, c10::DispatchKeySet, Stack* stack) {
    run(handle, traits_, stack);
  }

 private:
  Traits& traits_;
};

torch::CppFunction kernel_for(const OperatorHandle& handle) {
  return torch::CppFunction::makeFromBoxedFunctor(
      std::make_unique<Operator>(registry().traits_of(handle)));
}

// Operators of other libraries, and of torch's own sparse and quantized parts.
void run_any(const OperatorHandle& handle, Stack* stack) {
  run(handle, registry().traits_of(handle), stack);
}

// Storages and streams have no counterpart on the CPU; such operators are written by hand.
bool takes_handles(const OperatorHandle& handle) {
  for (const auto& argument : handle.schema().arguments()) {
    const auto type = argument.type()->str();
    if (type.find("Storage") != std::string::npos || type.find("Stream") != std::string::npos) {
      return true;
    }
  }
  return false;
}

// Whether torch leaves the operator whole until it reaches the device.
bool reaches_device(const OperatorHandle& handle) {
  return handle.hasKernelForDispatchKey(DispatchKey::CPU) ||
         handle.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
         handle.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional);
}

}  // namespace

void register_operators(const OperatorNames& whole) {
  static torch::Library device(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__,
                               __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1,
                                 __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto handle = c10::Dispatcher::singleton().findOp(name);
    if (name.getNamespace() != "aten" || !handle || !handle->hasSchema()) continue;
    const auto is_written_by_hand = handle->hasKernelForDispatchKey(DispatchKey::PrivateUse1);
    if (is_written_by_hand || takes_handles(*handle)) continue;
    const auto full_name = c10::toString(name);
    const auto short_name = full_name.substr(std::strlen("aten::"));
    if (reaches_device(*handle)) {
      device.impl(short_name.c_str(), kernel_for(*handle));
    } else if (whole.contains(full_name) &&
               handle->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
      device.impl(short_name.c_str(), kernel_for(*handle));
      // Below autograd it would have no derivative; here its parts give it.
      autograd.impl(short_name.c_str(), kernel_for(*handle));
    }
  }
}

void set_native_operators(std::optional<OperatorNames> names) {
  registry().set_native(std::move(names));
}

void set_warner(void (*warn)(const std::string& message)) { warner = warn; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_any>());
}

}  // namespace npu_sim
