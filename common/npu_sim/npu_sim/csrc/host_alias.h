// Runs CPU kernels on the tensors of a device whose memory the host can read, without copies.
//
// A header of its own, for any PrivateUse1 backend in host memory: the simulated device of this
// directory, and the real torch_npu on a stand-in CANN. It gives, in namespace host_alias:
//
//   host_tensor(tensor) a CPU tensor over the same bytes, with sizes, strides, offset and flags.
//   DeviceMemory        how the device takes over what a CPU kernel made. The base class copies,
//                       by public operators only; a backend that can adopt memory overrides it.
//   HostCall            the tensors of one call: argument() in, result() out, write_back() after.
//   OperatorNeeds       what must be known of an operator before its call; made once from it.
//   run_on_host(...)    a boxed call: arguments in, CPU kernel, write-back, results out.
//
// Views stay views, in-place and out= arguments may be resized, random operators draw from the
// device's generator and leave the CPU's as it was, and devices may not be mixed.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace host_alias {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// A storage on the CPU over the bytes of a device's storage, which it keeps alive.
inline c10::Storage host_storage(const c10::Storage& storage) {
  auto* owner = new c10::Storage(storage);
  auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.unsafeGetStorageImpl()->mutable_data(), owner, release, c10::kCPU),
      c10::GetCPUAllocator(), /*resizable=*/true);
}

// A tensor over `storage` with the geometry and the flags of `model`.
inline at::Tensor tensor_over(c10::Storage storage, const at::Tensor& model,
                              c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), model.dtype());
  auto* implementation = tensor.unsafeGetTensorImpl();
  implementation->set_sizes_and_strides(model.sizes(), model.strides(), model.storage_offset());
  if (model.unsafeGetTensorImpl()->is_wrapped_number()) implementation->set_wrapped_number(true);
  if (model.is_conj()) implementation->_set_conj(true);
  if (model.is_neg()) implementation->_set_neg(true);
  return tensor;
}

inline void check_strided(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided && tensor.has_storage(),
                              "the simulated NPU has strided tensors only, and this one is ",
                              tensor.layout());
}

inline at::Tensor host_tensor(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == kDevice, "expected a tensor on ",
              c10::DeviceTypeName(kDevice, true), ", but this one is on ", tensor.device());
  check_strided(tensor);
  return tensor_over(host_storage(tensor.storage()), tensor, c10::DispatchKey::CPU);
}

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  // A tensor on `device` with the values of a fresh CPU tensor.
  virtual at::Tensor adopt(const at::Tensor& cpu, c10::Device device) {
    auto tensor = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(device));
    host_tensor(tensor).copy_(cpu);
    return tensor;
  }

  // A view of `base`'s storage with the geometry of `cpu`.
  virtual at::Tensor view(const at::Tensor& base, const at::Tensor& cpu) {
    return base.as_strided(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

  // `tensor` takes geometry and values of `cpu`: a kernel has resized its alias.
  virtual void resized(const at::Tensor& tensor, const at::Tensor& cpu, bool moved) {
    tensor.resize_(cpu.sizes());
    if (moved) host_tensor(tensor).copy_(cpu);
  }

  // The CPU generator that stands for one of the device's.
  virtual at::Generator host_generator(const at::Generator& generator) = 0;
};

[[noreturn]] inline void refuse_mixed(c10::Device one, c10::Device other,
                                      const std::string& name) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two "
              "devices, ", one, " and ", other, "! (in ", name, ")");
}

// Copies of what a CPU kernel works on, in both directions.
class HostCall {
 public:
  HostCall(DeviceMemory& memory, const std::string& name) : memory_(memory), name_(name) {}

  // The CPU tensor that stands for an argument. A host tensor passes if it is a number (no
  // dimensions), as on a GPU; `host_allowed` is for indices, which the device fetches itself.
  at::Tensor argument(const at::Tensor& tensor, bool host_allowed = false) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kDevice) {
      const bool passes = tensor.device().is_cpu() && (tensor.dim() == 0 || host_allowed);
      if (!passes) host_device_ = tensor.device();
      return tensor;
    }
    check_strided(tensor);
    if (!device_) device_ = tensor.device();
    if (*device_ != tensor.device()) refuse_mixed(*device_, tensor.device(), name_);
    auto cpu = tensor_over(host_of(tensor.storage()), tensor, c10::DispatchKey::CPU);
    tensors_.push_back({tensor, cpu});
    return cpu;
  }

  // After the last argument: where results go, if no argument says so.
  void settle_device(std::optional<c10::Device> asked) {
    if (device_ && host_device_) refuse_mixed(*device_, *host_device_, name_);
    if (device_) return;
    device_ = asked && asked->type() == kDevice ? *asked : c10::Device(kDevice);
    if (!device_->has_index()) device_ = c10::impl::VirtualGuardImpl(kDevice).getDevice();
  }

  // Only after settle_device().
  c10::Device device() const { return *device_; }

  // A kernel may have resized an in-place or out= argument.
  void write_back() {
    for (auto& pair : tensors_) {
      const bool moved = pair.cpu.numel() > 0 && storage_moved(pair.cpu.storage());
      if (moved || !same_geometry(pair.device, pair.cpu)) {
        memory_.resized(pair.device, pair.cpu, moved);
      }
    }
  }

  // The device's tensor for what the kernel returned: an argument, a view of one, or new.
  at::Tensor result(const at::Tensor& cpu) {
    if (!cpu.defined() || !cpu.device().is_cpu()) return cpu;
    for (auto& pair : tensors_) {
      if (pair.cpu.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) return pair.device;
    }
    for (auto& pair : tensors_) {
      if (pair.cpu.storage().is_alias_of(cpu.storage())) return memory_.view(pair.device, cpu);
    }
    auto tensor = memory_.adopt(cpu, device());
    tensors_.push_back({tensor, cpu});
    return tensor;
  }

 private:
  struct Tensors {
    at::Tensor device, cpu;
  };
  struct Storages {
    c10::Storage device, cpu;
    const void* data;
  };

  // Arguments that share a storage must share it on the CPU too.
  const c10::Storage& host_of(const c10::Storage& storage) {
    for (auto& pair : storages_) {
      if (pair.device.is_alias_of(storage)) return pair.cpu;
    }
    auto cpu = host_storage(storage);
    storages_.push_back({storage, cpu, cpu.data()});
    return storages_.back().cpu;
  }

  bool storage_moved(const c10::Storage& cpu) const {
    for (auto& pair : storages_) {
      if (pair.cpu.is_alias_of(cpu)) return pair.data != cpu.data();
    }
    return false;
  }

  static bool same_geometry(const at::Tensor& one, const at::Tensor& other) {
    return one.sizes() == other.sizes() && one.strides() == other.strides() &&
           one.storage_offset() == other.storage_offset();
  }

  DeviceMemory& memory_;
  const std::string& name_;
  c10::SmallVector<Storages, 6> storages_;
  c10::SmallVector<Tensors, 6> tensors_;
  std::optional<c10::Device> device_, host_device_;
};

struct OperatorNeeds {
  explicit OperatorNeeds(const c10::OperatorHandle& handle)
      : name(c10::toString(handle.operator_name())),
        arguments(handle.schema().arguments().size()),
        results(handle.schema().returns().size()),
        draws(handle.hasTag(at::Tag::nondeterministic_seeded)) {
    for (size_t i = 0; i < arguments; i++) {
      if (handle.schema().arguments()[i].type()->str() == "Generator?") generator = i;
    }
  }

  std::string name;  // aten::add.Tensor
  size_t arguments, results;
  bool draws;                       // random numbers
  std::optional<size_t> generator;  // which argument is the generator
};

// While it lives, the CPU's default generator has the state of another, for operators that draw
// and take no generator.
class BorrowedGenerator {
 public:
  explicit BorrowedGenerator(at::Generator lender)
      : guard_(mutex()),
        lender_(std::move(lender)),
        cpu_(at::detail::getDefaultCPUGenerator()),
        saved_(cpu_.unsafeGetGeneratorImpl()->get_state()) {
    move_state(lender_, cpu_);
  }
  BorrowedGenerator(const BorrowedGenerator&) = delete;
  BorrowedGenerator& operator=(const BorrowedGenerator&) = delete;
  ~BorrowedGenerator() {
    move_state(cpu_, lender_);
    cpu_.unsafeGetGeneratorImpl()->set_state(*saved_);
  }

 private:
  static std::mutex& mutex() {
    static std::mutex one_at_a_time;
    return one_at_a_time;
  }
  static void move_state(const at::Generator& from, const at::Generator& to) {
    to.unsafeGetGeneratorImpl()->set_state(*from.unsafeGetGeneratorImpl()->get_state());
  }

  std::lock_guard<std::mutex> guard_;
  at::Generator lender_, cpu_;
  c10::intrusive_ptr<c10::TensorImpl> saved_;
};

inline c10::IValue argument_to_host(const c10::IValue& value, HostCall& call,
                                    DeviceMemory& memory) {
  if (value.isTensor()) return call.argument(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(call.argument(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      list.push_back(tensor ? std::optional(call.argument(*tensor, true)) : std::nullopt);
    }
    return list;
  }
  if (value.isGenerator()) {
    const auto generator = value.toGenerator();
    TORCH_CHECK(generator.device().type() == kDevice, "Expected a '",
                c10::DeviceTypeName(kDevice, true), "' device type for generator but found '",
                generator.device().type(), "'");
    return memory.host_generator(generator);
  }
  return value.isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : value;
}

inline c10::IValue result_to_device(const c10::IValue& value, HostCall& call) {
  if (value.isTensor()) return call.result(value.toTensor());
  if (!value.isTensorList()) return value;
  std::vector<at::Tensor> list;
  for (const auto& tensor : value.toTensorVector()) list.push_back(call.result(tensor));
  return list;
}

// Runs the CPU kernel of `handle`, whose arguments end the stack, and leaves its results there.
inline void run_on_host(const c10::OperatorHandle& handle, const OperatorNeeds& needs,
                        torch::jit::Stack& stack, DeviceMemory& memory) {
  HostCall call(memory, needs.name);
  std::optional<c10::Device> asked;
  const auto begin = stack.size() - needs.arguments;
  for (auto i = begin; i < stack.size(); i++) {
    if (stack[i].isDevice()) asked = stack[i].toDevice();
    stack[i] = argument_to_host(stack[i], call, memory);
  }
  call.settle_device(asked);
  std::optional<BorrowedGenerator> borrowed;
  if (needs.draws) {
    auto generator = [&] {
      return memory.host_generator(at::globalContext().defaultGenerator(call.device()));
    };
    if (!needs.generator) {
      borrowed.emplace(generator());
    } else if (stack[begin + *needs.generator].isNone()) {
      stack[begin + *needs.generator] = generator();
    }
  }
  {
    // Autocast has had its say before the call came here.
    constexpr c10::DispatchKeySet autocast(
        {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastPrivateUse1});
    c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast);
    handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  }
  call.write_back();
  if (asked && asked->type() != kDevice) return;  // the caller wants results elsewhere
  for (auto i = stack.size() - needs.results; i < stack.size(); i++) {
    stack[i] = result_to_device(stack[i], call);
  }
}

}  // namespace host_alias
