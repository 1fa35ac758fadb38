// Operators that are about memory itself, so that no CPU kernel can stand for them.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <torch/library.h>

#include "device.h"
#include "host_alias.h"
#include "memory.h"
#include "record.h"

namespace npu_sim {
namespace {

using at::IntArrayRef;
using at::MemoryFormat;
using at::ScalarType;
using at::Tensor;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void check_options(std::optional<at::Layout> layout, std::optional<bool> pin_memory) {
  TORCH_CHECK_NOT_IMPLEMENTED(c10::layout_or_default(layout) == at::kStrided,
                              "the simulated NPU has strided tensors only, and not ", *layout);
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory),
              "Only dense CPU tensors can be pinned");
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<Device> device, std::optional<bool> pin_memory,
             std::optional<MemoryFormat> memory_format) {
  static const std::string name = "aten::empty.memory_format";
  check_options(layout, pin_memory);
  const CardGuard card(card_of(device));
  OperatorScope scope(name, Way::kNative);
  scope.inputs(at::ArrayRef<Tensor>());
  const Tensor tensor = at::detail::empty_generic(size, card_allocator(), kKeys,
                                          c10::dtype_or_default(dtype), memory_format);
  scope.outputs(tensor);
  return tensor;
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<Device> device,
                     std::optional<bool> pin_memory) {
  static const std::string name = "aten::empty_strided";
  check_options(layout, pin_memory);
  const CardGuard card(card_of(device));
  OperatorScope scope(name, Way::kNative);
  scope.inputs(at::ArrayRef<Tensor>());
  const Tensor tensor = at::detail::empty_strided_generic(size, stride, card_allocator(), kKeys,
                                                  c10::dtype_or_default(dtype));
  scope.outputs(tensor);
  return tensor;
}

bool is_on_device(const Tensor& tensor) { return tensor.device().type() == kNPU; }

// The host waits for a copy unless it asked not to, and the copy's host side is pinned.
void record_transfer(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (is_on_device(from) && is_on_device(to)) {
    record_copy("device_to_device", from, non_blocking);
    return;
  }
  record_copy(is_on_device(from) ? "device_to_host" : "host_to_device", from, non_blocking);
  const auto& host = is_on_device(from) ? to : from;
  if (!non_blocking || !is_pinned(host.storage().data())) record_sync("copy");
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  require_card();
  if (is_recording()) record_transfer(self, to, non_blocking);
  const auto host_from = is_on_device(self) ? host_alias::host_tensor(self) : self;
  auto host_to = is_on_device(to) ? host_alias::host_tensor(to) : to;
  host_to.copy_(host_from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  at::native::resize_(to, self.sizes(), std::nullopt);
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  static const std::string name = "aten::_local_scalar_dense";
  require_card();
  // Where torch's decomposition stands for a kernel of the NPU, that kernel would not read back.
  if (!OperatorScope::is_inside_kernel()) {
    OperatorScope scope(name, Way::kNative);
    scope.inputs(self);
    record_sync("item");
  }
  return host_alias::host_tensor(self).item();
}

const Tensor& resize(const Tensor& self, IntArrayRef size,
                     std::optional<MemoryFormat> memory_format) {
  static const std::string name = "aten::resize_";
  require_card();
  OperatorScope scope(name, Way::kNative);
  scope.inputs(self);
  auto* tensor = self.unsafeGetTensorImpl();
  if (tensor->sizes() != size || memory_format) {
    tensor->set_sizes_contiguous(size);
    if (memory_format && *memory_format != MemoryFormat::Preserve) {
      tensor->empty_tensor_restride(*memory_format);
    }
    const size_t bytes =
        at::detail::computeStorageNbytes(tensor->sizes(), tensor->strides(),
                                         tensor->dtype().itemsize(), tensor->storage_offset());
    if (bytes > tensor->storage().nbytes()) resize_storage(tensor->storage(), bytes);
  }
  scope.outputs(self);
  return self;
}

Tensor& set_part_of_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size,
                            IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    tensor->set_storage_offset(offset);
    tensor->set_sizes_contiguous(size);
  } else {
    tensor->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_part_of_storage(self, std::move(source), 0, {elements}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_part_of_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                             source.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_part_of_storage(self, empty_storage(self.device().index()), 0, {0}, {});
}

// Memory is free when it is freed: no stream works after a call has returned.
void record_stream(Tensor&, c10::Stream) {}

// torch_npu's own attention is a fused kernel; its numbers are those of the formula.
int64_t attention_kernel(const Tensor&, const Tensor&, const Tensor&,
                         const std::optional<Tensor>&, double, bool, std::optional<double>,
                         bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_part_of_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_nothing);
  library.impl("record_stream", record_stream);
  library.impl("_fused_sdp_choice", attention_kernel);
}

}  // namespace npu_sim

// scaled_dot_product_attention asks this table, not the dispatcher.
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &npu_sim::attention_kernel);
}  // namespace at::native
