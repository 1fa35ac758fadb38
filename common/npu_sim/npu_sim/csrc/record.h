// What happens on the device, noted down while someone asks for it: operators, copies, syncs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

typedef struct _object PyObject;

namespace npu_sim {

struct TensorNote {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

// How an operator is computed, on a torch_npu with a given set of kernels.
enum class Way { kNative, kDecomposed, kCpuFallback };

using PythonStack = std::shared_ptr<PyObject>;  // empty unless stacks are asked for

struct OperatorNote {
  std::string name;
  Way way;
  std::string parent;  // empty: called by the program itself
  std::vector<TensorNote> inputs, outputs;
  PythonStack stack;
};

struct CopyNote {
  const char* kind;
  TensorNote tensor;
  bool non_blocking;
  PythonStack stack;
};

struct SyncNote {
  const char* kind;
  std::string op;
  PythonStack stack;
};

struct Notes {
  std::vector<OperatorNote> operators;
  std::vector<CopyNote> copies;
  std::vector<SyncNote> syncs;
};

// Where a recording begins and ends in the notes.
struct Position {
  size_t operators, copies, syncs;
};

extern std::atomic<bool> recording;
inline bool is_recording() { return recording.load(std::memory_order_relaxed); }

// Recordings may be nested and take turns on several threads; the notes are kept until the last
// one has stopped. `take_stack` is called without a lock held.
Position start_recording(bool stacks);
void stop_recording(bool stacks);
Position position();
Notes notes_between(const Position& begin, const Position& end);
void set_stack_taker(PythonStack (*take_stack)());

void record_copy(const char* kind, const at::Tensor& tensor, bool non_blocking);
// The operator is the one that runs; without one, the sync is the program's own.
void record_sync(const char* kind);

// One call of an operator, from its first to its last instruction. Scopes are nested by thread:
// what a native kernel or the CPU calls to do its work is no operator of the device, and what a
// decomposed operator calls is noted with that operator as its parent.
class OperatorScope {
 public:
  // `name` must outlive the scope.
  OperatorScope(const std::string& name, Way way);
  OperatorScope(const OperatorScope&) = delete;
  OperatorScope& operator=(const OperatorScope&) = delete;
  ~OperatorScope();

  // The last `count` values of the stack.
  void inputs(const torch::jit::Stack& stack, size_t count);
  void outputs(const torch::jit::Stack& stack, size_t count);
  void inputs(at::ArrayRef<at::Tensor> tensors);
  void outputs(at::ArrayRef<at::Tensor> tensors);

  // Whether the calling code is part of another operator's kernel.
  static bool is_inside_kernel();

  const std::string& name() const { return *name_; }

 private:
  void begin(std::vector<TensorNote> inputs);
  void finish(std::vector<TensorNote> outputs);

  const std::string* const name_;
  const Way way_;
  const bool hidden_;
  OperatorScope* const outer_;
  std::optional<std::pair<uint64_t, size_t>> note_;  // number of the notes, place in them
};

}  // namespace npu_sim
