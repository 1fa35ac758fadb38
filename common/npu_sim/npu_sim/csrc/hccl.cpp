#include "hccl.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/python_headers.h>

#include <chrono>
#include <functional>
#include <mutex>
#include <utility>

#include "device.h"
#include "host_alias.h"

namespace npu_sim {
namespace {

using at::Tensor;
using c10d::ReduceOp;
using Tensors = Hccl::Tensors;
using TensorLists = Hccl::TensorLists;
using Finish = std::function<void()>;
using Future = c10::ivalue::Future;

// gloo's work, and what remains to be done on its results.
class HcclWork final : public c10d::Work {
 public:
  HcclWork(c10::intrusive_ptr<c10d::Work> gloo, Tensors outputs, Finish finish)
      : c10d::Work(-1, c10d::OpType::UNKNOWN),
        gloo_(std::move(gloo)),
        outputs_(std::move(outputs)),
        finish_(std::move(finish)) {}

  bool isCompleted() override { return gloo_->isCompleted(); }
  bool isSuccess() const override { return gloo_->isSuccess(); }
  bool wait(std::chrono::milliseconds timeout) override {
    const bool done = gloo_->wait(timeout);
    finish_once();
    return done;
  }
  void synchronize() override { wait(kNoTimeout); }
  void abort() override { gloo_->abort(); }
  Tensors result() override { return outputs_; }

  // DDP goes on from here, on gloo's thread.
  c10::intrusive_ptr<Future> getFuture() override {
    auto future = c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()),
                                              devices());
    auto self = c10::intrusive_ptr<HcclWork>::reclaim_copy(this);
    gloo_->getFuture()->addCallback([self, future](Future& done) {
      if (done.hasError()) return future->setError(done.exception_ptr());
      self->finish_once();
      future->markCompleted(self->outputs_);
    });
    return future;
  }

 private:
  void finish_once() {
    std::call_once(finished_, [this] {
      if (finish_) finish_();
    });
  }

  std::vector<Device> devices() const {
    std::vector<Device> result;
    for (const auto& tensor : outputs_) {
      if (std::find(result.begin(), result.end(), tensor.device()) == result.end()) {
        result.push_back(tensor.device());
      }
    }
    return result;
  }

  c10::intrusive_ptr<c10d::Work> gloo_;
  Tensors outputs_;
  Finish finish_;
  std::once_flag finished_;
};

Hccl::Work work(c10::intrusive_ptr<c10d::Work> gloo, Tensors outputs, Finish finish = {}) {
  return c10::make_intrusive<HcclWork>(std::move(gloo), std::move(outputs), std::move(finish));
}

Tensor on_host(const Tensor& tensor) {
  require_card();
  TORCH_CHECK(tensor.device().type() == kNPU && tensor.layout() == at::kStrided,
              "Tensors must be NPU and dense, but hccl was given one on ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "Tensors must be contiguous");
  return host_alias::host_tensor(tensor);
}

Tensors on_host(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(on_host(tensor));
  return result;
}

TensorLists on_host(const TensorLists& lists) {
  TensorLists result;
  for (const auto& tensors : lists) result.push_back(on_host(tensors));
  return result;
}

// HCCL sees bytes where gloo would split the first dimension.
Tensor flat_on_host(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
  return on_host(tensor).view({-1});
}

Tensors flat_on_host(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(flat_on_host(tensor));
  return result;
}

enum class Bytes { kAreWidened, kAreRefused };

// HCCL's reductions on Atlas A2 and A3. It widens uint8 and bool first, except to scatter.
void check_reduction(const char* name, const Tensors& tensors, const ReduceOp& op, Bytes bytes) {
  for (const auto& tensor : tensors) {
    switch (tensor.scalar_type()) {
      case at::kChar: case at::kShort: case at::kInt: case at::kLong:
      case at::kHalf: case at::kBFloat16: case at::kFloat:
        continue;
      case at::kByte: case at::kBool:
        if (bytes == Bytes::kAreWidened) continue;
        [[fallthrough]];
      default:
        TORCH_CHECK(false, "HCCL ", name, ": Unsupported data type ", tensor.scalar_type());
    }
  }
  for (const auto& [refused, refused_name] :
       {std::pair{ReduceOp::BAND, "BAND"}, {ReduceOp::BOR, "BOR"}, {ReduceOp::BXOR, "BXOR"}}) {
    TORCH_CHECK(op.op_ != refused, "Cannot use ReduceOp.", refused_name, " with HCCL");
  }
}

// What gloo is given for a reduction, and what must be done with its results.
struct Reduction {
  Tensors tensors;
  Finish finish;
};

// gloo has no mean and no 16-bit integers; bytes are added up wider, as HCCL does.
Tensor widened(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  const bool is_narrow = type == at::kByte || type == at::kBool || type == at::kShort;
  return is_narrow ? tensor.to(at::kInt) : tensor;
}

template <class Options>
Finish mean_over(int processes, const Tensors& results, Options& options) {
  if (options.reduceOp.op_ != ReduceOp::AVG) return {};
  options.reduceOp = ReduceOp::SUM;
  return [results, processes] {
    for (const auto& tensor : results) {
      at::isFloatingType(tensor.scalar_type()) ? tensor.div_(processes)
                                               : tensor.floor_divide_(processes);
    }
  };
}

template <class Options>
Reduction in_place_reduction(const Tensors& tensors, int processes, Options& options) {
  Reduction result;
  const auto hosts = on_host(tensors);
  for (const auto& host : hosts) result.tensors.push_back(widened(host));
  auto divide = mean_over(processes, result.tensors, options);
  result.finish = [hosts, wide = result.tensors, divide] {
    if (divide) divide();
    for (size_t i = 0; i < hosts.size(); i++) {
      if (!wide[i].is_same(hosts[i])) hosts[i].copy_(wide[i]);
    }
  };
  return result;
}

}  // namespace

// Gloo's threads may have to free a Python object before they end, so who waits for them must not
// hold the interpreter's lock.
Hccl::~Hccl() {
  if (!Py_IsInitialized() || !PyGILState_Check()) return;
  PyThreadState* state = PyEval_SaveThread();
  gloo_.reset();
  PyEval_RestoreThread(state);
}

Hccl::Hccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size)
    : c10d::Backend(rank, size), gloo_(std::move(gloo)) {}

Hccl::Work Hccl::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  check_reduction("allreduce", tensors, options.reduceOp, Bytes::kAreWidened);
  auto host_options = options;
  auto reduction = in_place_reduction(tensors, getSize(), host_options);
  return work(gloo_->allreduce(reduction.tensors, host_options), tensors, reduction.finish);
}

Hccl::Work Hccl::allreduce_coalesced(Tensors& tensors,
                                     const c10d::AllreduceCoalescedOptions& options) {
  check_reduction("allreduce_coalesced", tensors, options.reduceOp, Bytes::kAreWidened);
  auto host_options = options;
  auto reduction = in_place_reduction(tensors, getSize(), host_options);
  return work(gloo_->allreduce_coalesced(reduction.tensors, host_options), tensors,
              reduction.finish);
}

Hccl::Work Hccl::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  check_reduction("reduce", tensors, options.reduceOp, Bytes::kAreWidened);
  auto host_options = options;
  auto reduction = in_place_reduction(tensors, getSize(), host_options);
  return work(gloo_->reduce(reduction.tensors, host_options), tensors, reduction.finish);
}

Hccl::Work Hccl::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  auto hosts = on_host(tensors);
  return work(gloo_->broadcast(hosts, options), tensors);
}

Hccl::Work Hccl::allgather(TensorLists& outputs, Tensors& inputs,
                           const c10d::AllgatherOptions& options) {
  auto host_outputs = on_host(outputs);
  auto host_inputs = on_host(inputs);
  return work(gloo_->allgather(host_outputs, host_inputs, options), outputs.at(0));
}

Hccl::Work Hccl::_allgather_base(Tensor& output, Tensor& input,
                                 const c10d::AllgatherOptions& options) {
  auto host_output = flat_on_host(output);
  auto host_input = flat_on_host(input);
  return work(gloo_->_allgather_base(host_output, host_input, options), {output});
}

Hccl::Work Hccl::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                 const c10d::AllgatherOptions& options) {
  auto host_outputs = flat_on_host(outputs);
  auto host_inputs = flat_on_host(inputs);
  return work(gloo_->allgather_into_tensor_coalesced(host_outputs, host_inputs, options), outputs);
}

Hccl::Work Hccl::gather(TensorLists& outputs, Tensors& inputs,
                        const c10d::GatherOptions& options) {
  auto host_outputs = on_host(outputs);
  auto host_inputs = on_host(inputs);
  return work(gloo_->gather(host_outputs, host_inputs, options),
              outputs.empty() ? Tensors() : outputs[0]);
}

Hccl::Work Hccl::scatter(Tensors& outputs, TensorLists& inputs,
                         const c10d::ScatterOptions& options) {
  auto host_outputs = on_host(outputs);
  auto host_inputs = on_host(inputs);
  return work(gloo_->scatter(host_outputs, host_inputs, options), outputs);
}

Hccl::Work Hccl::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                const c10d::ReduceScatterOptions& options) {
  check_reduction("reduce_scatter", outputs, options.reduceOp, Bytes::kAreRefused);
  auto host_outputs = on_host(outputs);
  auto host_inputs = on_host(inputs);
  auto host_options = options;
  auto finish = mean_over(getSize(), host_outputs, host_options);
  return work(gloo_->reduce_scatter(host_outputs, host_inputs, host_options), outputs, finish);
}

Hccl::Work Hccl::_reduce_scatter_base(Tensor& output, Tensor& input,
                                      const c10d::ReduceScatterOptions& options) {
  check_reduction("_reduce_scatter_base", {input}, options.reduceOp, Bytes::kAreRefused);
  auto host_output = flat_on_host(output);
  auto host_input = flat_on_host(input);
  auto host_options = options;
  auto finish = mean_over(getSize(), {host_output}, host_options);
  return work(gloo_->_reduce_scatter_base(host_output, host_input, host_options), {output},
              finish);
}

Hccl::Work Hccl::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                 const c10d::ReduceScatterOptions& options) {
  check_reduction("reduce_scatter_tensor_coalesced", inputs, options.reduceOp,
                  Bytes::kAreRefused);
  auto host_outputs = flat_on_host(outputs);
  auto host_inputs = flat_on_host(inputs);
  auto host_options = options;
  auto finish = mean_over(getSize(), host_outputs, host_options);
  return work(gloo_->reduce_scatter_tensor_coalesced(host_outputs, host_inputs, host_options),
              outputs, finish);
}

Hccl::Work Hccl::alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                               std::vector<int64_t>& input_sizes,
                               const c10d::AllToAllOptions& options) {
  auto host_output = on_host(output);
  auto host_input = on_host(input);
  return work(gloo_->alltoall_base(host_output, host_input, output_sizes, input_sizes, options),
              {output});
}

Hccl::Work Hccl::alltoall(Tensors& outputs, Tensors& inputs,
                          const c10d::AllToAllOptions& options) {
  auto host_outputs = on_host(outputs);
  auto host_inputs = on_host(inputs);
  return work(gloo_->alltoall(host_outputs, host_inputs, options), outputs);
}

Hccl::Work Hccl::send(Tensors& tensors, int to, int tag) {
  auto hosts = on_host(tensors);
  return work(gloo_->send(hosts, to, tag), tensors);
}

Hccl::Work Hccl::recv(Tensors& tensors, int from, int tag) {
  auto hosts = on_host(tensors);
  return work(gloo_->recv(hosts, from, tag), tensors);
}

Hccl::Work Hccl::barrier(const c10d::BarrierOptions& options) {
  c10d::BarrierOptions host_options;  // gloo takes no device
  host_options.timeout = options.timeout;
  return work(gloo_->barrier(host_options), {});
}

namespace {

// Tells DDP how long the parts of a step took. All work is done when a call returns, so the
// host's clock says it.
class CardTimer final : public c10d::Timer {
 public:
  explicit CardTimer(Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimeRef(start);
    const auto to = getTimeRef(end);
    if (from == c10d::kUnsetTime || to == c10d::kUnsetTime || to < from) return std::nullopt;
    return to - from;
  }
};

}  // namespace
}  // namespace npu_sim

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kPrivateUse1, npu_sim::CardTimer)
}  // namespace c10d
