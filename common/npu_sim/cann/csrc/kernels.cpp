// Puts kernels of the CPU in the place of those with which torch_npu starts operators of CANN.
//
// Only operators that torch_npu has a kernel for are touched. Any other still goes to torch_npu's
// own fallback, which warns, or fails under TORCH_NPU_FALLBACK_CPU_DISABLE=1: so what the real
// package cannot do on a card cannot pass unseen here.
#include <host_alias.h>

#include <torch/extension.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace stand_in {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::OperatorHandle;
using host_alias::OperatorNeeds;
using torch::jit::Stack;

// These move memory or make views, and run for real on the stand-in's memory.
const std::set<std::string> kReal = {
    "aten::_copy_from_and_resize",
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::contiguous",
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::unfold",
    "aten::view",
    // Checks its arguments and calls npu_fusion_attention_v3, which has a stand-in of its own.
    "aten::scaled_dot_product_attention",
};

// These have no kernel of the CPU's own, yet a general one that must see CPU tensors: on NPU
// tensors it would call the very operator that is replaced.
const std::set<std::string> kGeneral = {
    "aten::convolution",
    "aten::convolution_backward",
    "aten::convolution_overrideable",
    "aten::convolution_backward_overrideable",
};

// With TASK_QUEUE_ENABLE, copies and collectives may still wait in torch_npu's queue of calls to
// CANN, which the kernels here do not go through.
void finish_queue() {
    c10_npu::getCurrentNPUStream().stream();
}

class Memory : public host_alias::DeviceMemory {
public:
    // A CPU generator that goes on from where the card's is, and moves that one on.
    at::Generator host_generator(const at::Generator& npu) override {
        constexpr uint64_t kSpread = 0x9E3779B97F4A7C15; // neighbouring seeds must not be alike
        constexpr uint64_t kDrawn = 16; // a multiple of the four that Philox draws at once
        auto* state = npu.unsafeGetGeneratorImpl();
        uint64_t offset = state->get_offset();
        state->set_offset(offset + kDrawn);
        return at::make_generator<at::CPUGeneratorImpl>(npu.current_seed() * kSpread + offset);
    }
};

// What an operator needs, found out at its first call.
const OperatorNeeds& needs_of(const OperatorHandle& op) {
    static std::mutex one_at_a_time;
    static std::unordered_map<c10::OperatorName, OperatorNeeds> known;
    std::lock_guard<std::mutex> guard(one_at_a_time);
    auto found = known.find(op.operator_name());
    if (found == known.end()) {
        found = known.emplace(op.operator_name(), OperatorNeeds(op)).first;
    }
    return found->second;
}

// Runs the operator's CPU kernel.
void on_host(const OperatorHandle& op, Stack* stack) {
    static Memory memory;
    finish_queue();
    host_alias::run_on_host(op, needs_of(op), *stack, memory);
}

// Runs the operator as the parts that torch makes of it, each of which comes here in turn.
template <DispatchKey kKey>
void by_parts(const OperatorHandle& op, Stack* stack) {
    op.callBoxedForDispatchKey(kKey, *stack);
}

// torch_npu's autograd formulas call its kernels directly, so torch's own go in their place; they
// call the operator again, below autograd.
void by_torch_formula(const OperatorHandle& op, Stack* stack) {
    op.callBoxedForDispatchKey(DispatchKey::Autograd, *stack);
}

std::optional<c10::SafeKernelFunction> real_copy;

// Copies within the cards. Those from and to the host stay torch_npu's, with their pinned memory,
// non_blocking and queue.
void copy(const OperatorHandle& op, Stack* stack) {
    auto arguments = torch::jit::last(*stack, 3);
    const auto& to = arguments[0].toTensor();
    const auto& from = arguments[1].toTensor();
    if (to.device().type() != host_alias::kDevice || from.device().type() != host_alias::kDevice) {
        real_copy->callBoxed(op, DispatchKeySet(DispatchKey::PrivateUse1), stack);
        return;
    }
    finish_queue();
    host_alias::host_tensor(to).copy_(host_alias::host_tensor(from));
    torch::jit::drop(*stack, 2);
}

bool takes(const OperatorHandle& op, const std::string& type) {
    for (const auto& argument : op.schema().arguments()) {
        if (argument.type()->str().find(type) != std::string::npos) return true;
    }
    return false;
}

// Makes a kernel as the dispatcher takes it.
using Factory = torch::CppFunction (*)();

template <void (*kKernel)(const OperatorHandle&, Stack*)>
torch::CppFunction boxed() {
    return torch::CppFunction::makeFromBoxedFunction<kKernel>();
}

// What stands in for torch_npu's own kernel, or null where that stays.
Factory stand_in_for(const OperatorHandle& op, const std::string& name) {
    auto has = [&](DispatchKey key) { return op.hasKernelForDispatchKey(key); };
    if (name == "aten::copy_") return &boxed<&copy>;
    if (kReal.count(name) || takes(op, "Storage") || takes(op, "Stream")) return nullptr;
    if (kGeneral.count(name)) return &boxed<&on_host>;
    if (has(DispatchKey::CompositeImplicitAutograd)) {
        return &boxed<&by_parts<DispatchKey::CompositeImplicitAutograd>>;
    }
    if (has(DispatchKey::CPU)) return &boxed<&on_host>;
    if (has(DispatchKey::CompositeExplicitAutograd)) {
        return &boxed<&by_parts<DispatchKey::CompositeExplicitAutograd>>;
    }
    return nullptr;
}

Factory formula_for(const OperatorHandle& op, const std::string& name) {
    if (kReal.count(name)) return nullptr;
    if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
        return &boxed<&by_parts<DispatchKey::CompositeImplicitAutograd>>;
    }
    return &boxed<&by_torch_formula>;
}

// The name within its namespace, with the overload: add.Tensor.
std::string short_name(const c10::OperatorName& name) {
    auto base = name.name.substr(name.name.find("::") + 2);
    return name.overload_name.empty() ? base : base + "." + name.overload_name;
}

// Replaces torch_npu's kernels for a key by what `choose` gives; returns how many. Registrations
// last as long as the process.
int replace(DispatchKey key, Factory (*choose)(const OperatorHandle&, const std::string&)) {
    auto* library = new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    auto& dispatcher = c10::Dispatcher::singleton();
    int replaced = 0;
    for (const auto& name : dispatcher.getRegistrationsForDispatchKey(key)) {
        auto op = dispatcher.findOp(name);
        if (name.getNamespace() != "aten" || !op || !op->hasSchema()) continue;
        if (auto make = choose(*op, c10::toString(name))) {
            library->impl(short_name(name).c_str(), make());
            replaced++;
        }
    }
    return replaced;
}

int install() {
    auto copy_operator = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    real_copy = copy_operator.getComputedKernelForDispatchKey(DispatchKey::PrivateUse1);
    return replace(DispatchKey::PrivateUse1, &stand_in_for) +
        replace(DispatchKey::AutogradPrivateUse1, &formula_for);
}

} // namespace
} // namespace stand_in

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("install", &stand_in::install, "Replaces torch_npu's compute kernels.");
}
