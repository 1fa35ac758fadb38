#include "record.h"

#include <mutex>

namespace npu_sim {

std::atomic<bool> recording{false};

namespace {

std::mutex mutex;  // guards all of the following
Notes notes;
uint64_t notes_number = 0;  // tells later notes from those that a late finish() belongs to
int recordings = 0;
int recordings_with_stacks = 0;
PythonStack (*stack_taker)() = nullptr;

thread_local OperatorScope* innermost = nullptr;

TensorNote note_of(const at::Tensor& tensor) {
  return {tensor.scalar_type(), tensor.sizes().vec()};
}

void add_notes(const c10::IValue& value, std::vector<TensorNote>& to) {
  auto add = [&](const at::Tensor& tensor) {
    if (tensor.defined()) to.push_back(note_of(tensor));
  };
  if (value.isTensor()) {
    add(value.toTensor());
  } else if (value.isTensorList()) {
    for (const auto& tensor : value.toTensorVector()) add(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      if (tensor) add(*tensor);
    }
  }
}

std::vector<TensorNote> notes_of(const torch::jit::Stack& stack, size_t count) {
  std::vector<TensorNote> result;
  for (auto i = stack.size() - count; i < stack.size(); i++) add_notes(stack[i], result);
  return result;
}

std::vector<TensorNote> notes_of(at::ArrayRef<at::Tensor> tensors) {
  std::vector<TensorNote> result;
  for (const auto& tensor : tensors) add_notes(tensor, result);
  return result;
}

// Needs the GIL, so it must not be called under the mutex: another thread may hold the GIL and
// wait for the mutex.
PythonStack stack_if_asked() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!recordings_with_stacks || !stack_taker) return {};
  }
  return stack_taker();
}

template <class T>
std::vector<T> part(const std::vector<T>& all, size_t begin, size_t end) {
  return {all.begin() + static_cast<std::ptrdiff_t>(begin),
          all.begin() + static_cast<std::ptrdiff_t>(end)};
}

Position end_of_notes() {
  return {notes.operators.size(), notes.copies.size(), notes.syncs.size()};
}

}  // namespace

Position start_recording(bool stacks) {
  std::lock_guard<std::mutex> lock(mutex);
  recordings++;
  recordings_with_stacks += stacks;
  recording = true;
  return end_of_notes();
}

void stop_recording(bool stacks) {
  Notes finished;  // destroyed after the lock: it may hold Python objects
  std::lock_guard<std::mutex> lock(mutex);
  recordings--;
  recordings_with_stacks -= stacks;
  if (recordings > 0) return;
  recording = false;
  notes_number++;
  std::swap(notes, finished);
}

Position position() {
  std::lock_guard<std::mutex> lock(mutex);
  return end_of_notes();
}

Notes notes_between(const Position& begin, const Position& end) {
  std::lock_guard<std::mutex> lock(mutex);
  return {part(notes.operators, begin.operators, end.operators),
          part(notes.copies, begin.copies, end.copies), part(notes.syncs, begin.syncs, end.syncs)};
}

void set_stack_taker(PythonStack (*take_stack)()) {
  std::lock_guard<std::mutex> lock(mutex);
  stack_taker = take_stack;
}

void record_copy(const char* kind, const at::Tensor& tensor, bool non_blocking) {
  if (!is_recording()) return;
  auto stack = stack_if_asked();
  std::lock_guard<std::mutex> lock(mutex);
  if (!recordings) return;
  notes.copies.push_back({kind, note_of(tensor), non_blocking, std::move(stack)});
}

void record_sync(const char* kind) {
  if (!is_recording()) return;
  auto stack = stack_if_asked();
  std::lock_guard<std::mutex> lock(mutex);
  if (!recordings) return;
  notes.syncs.push_back({kind, innermost ? innermost->name() : "", std::move(stack)});
}

OperatorScope::OperatorScope(const std::string& name, Way way)
    : name_(is_inside_kernel() ? innermost->name_ : &name),
      way_(way),
      hidden_(is_inside_kernel()),
      outer_(innermost) {
  innermost = this;
}

OperatorScope::~OperatorScope() { innermost = outer_; }

bool OperatorScope::is_inside_kernel() {
  return innermost && (innermost->hidden_ || innermost->way_ != Way::kDecomposed);
}

void OperatorScope::inputs(const torch::jit::Stack& stack, size_t count) {
  if (is_recording() && !hidden_) begin(notes_of(stack, count));
}

void OperatorScope::inputs(at::ArrayRef<at::Tensor> tensors) {
  if (is_recording() && !hidden_) begin(notes_of(tensors));
}

void OperatorScope::outputs(const torch::jit::Stack& stack, size_t count) {
  if (note_) finish(notes_of(stack, count));
}

void OperatorScope::outputs(at::ArrayRef<at::Tensor> tensors) {
  if (note_) finish(notes_of(tensors));
}

void OperatorScope::begin(std::vector<TensorNote> inputs) {
  auto stack = stack_if_asked();
  std::lock_guard<std::mutex> lock(mutex);
  if (!recordings) return;
  note_.emplace(notes_number, notes.operators.size());
  notes.operators.push_back({*name_, way_, outer_ ? *outer_->name_ : std::string(),
                             std::move(inputs), {}, std::move(stack)});
}

void OperatorScope::finish(std::vector<TensorNote> outputs) {
  std::lock_guard<std::mutex> lock(mutex);
  if (note_->first == notes_number) notes.operators[note_->second].outputs = std::move(outputs);
}

}  // namespace npu_sim
