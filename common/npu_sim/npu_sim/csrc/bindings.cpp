// What Python sees of the device; npu_sim/__init__.py and its neighbours are the only users.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/device_lazy_init.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "hccl.h"
#include "host_alias.h"
#include "memory.h"
#include "operators.h"
#include "record.h"

namespace py = pybind11;

namespace npu_sim {
namespace {

PyObject* stack_function = nullptr;  // a Python function without arguments; lives for ever

PythonStack hold(py::object object) {
  auto release = [](PyObject* held) {
    py::gil_scoped_acquire gil;
    Py_DECREF(held);
  };
  return {object.release().ptr(), release};
}

PythonStack take_stack() {
  py::gil_scoped_acquire gil;
  return hold(py::reinterpret_borrow<py::object>(stack_function)());
}

// torch's own warnings reach Python only from calls that came through its generated bindings; an
// operator of a library, or of a backward pass, must warn too.
void warn(const std::string& message) {
  py::gil_scoped_acquire gil;
  if (PyErr_WarnEx(PyExc_UserWarning, message.c_str(), 1) != 0) throw python_error();
}

py::object to_python(const PythonStack& stack) {
  return stack ? py::reinterpret_borrow<py::object>(stack.get()) : py::tuple();
}

py::tuple to_python(const TensorNote& note) {
  return py::make_tuple(note.dtype, py::tuple(py::cast(note.shape)));
}

py::tuple to_python(const std::vector<TensorNote>& notes) {
  py::tuple result(notes.size());
  for (size_t i = 0; i < notes.size(); i++) result[i] = to_python(notes[i]);
  return result;
}

const char* name_of(Way way) {
  switch (way) {
    case Way::kNative: return "native";
    case Way::kDecomposed: return "decomposed";
    case Way::kCpuFallback: return "cpu_fallback";
  }
  return "";
}

// A recording: notes from start() to stop(), or to now.
class Recording {
 public:
  explicit Recording(bool stacks) : stacks_(stacks) {}

  void start() { begin_ = start_recording(stacks_); }

  void stop() {
    finished_ = notes_between(begin_, position());
    stop_recording(stacks_);
  }

  py::list operators() const {
    py::list result;
    for (const auto& note : notes().operators) {
      py::object parent = py::none();
      if (!note.parent.empty()) parent = py::str(note.parent);
      result.append(py::make_tuple(note.name, to_python(note.inputs), to_python(note.outputs),
                                   parent, name_of(note.way), to_python(note.stack)));
    }
    return result;
  }

  py::list copies() const {
    py::list result;
    for (const auto& note : notes().copies) {
      result.append(py::make_tuple(note.kind, note.tensor.dtype,
                                   py::tuple(py::cast(note.tensor.shape)), note.non_blocking,
                                   to_python(note.stack)));
    }
    return result;
  }

  py::list syncs() const {
    py::list result;
    for (const auto& note : notes().syncs) {
      result.append(py::make_tuple(note.kind, note.op, to_python(note.stack)));
    }
    return result;
  }

 private:
  Notes notes() const { return finished_ ? *finished_ : notes_between(begin_, position()); }

  const bool stacks_;
  Position begin_{};
  std::optional<Notes> finished_;
};

// A scope that Python opens and closes around a kernel written in Python.
class PythonScope {
 public:
  PythonScope(std::string name, const std::vector<at::Tensor>& inputs)
      : name_(std::move(name)), inputs_(inputs) {}

  void enter() {
    scope_.emplace(name_, Way::kNative);
    scope_->inputs(inputs_);
    inputs_.clear();
  }
  void outputs(const std::vector<at::Tensor>& tensors) {
    if (scope_) scope_->outputs(tensors);
  }
  void exit(const py::args&) { scope_.reset(); }

 private:
  const std::string name_;
  std::vector<at::Tensor> inputs_;
  std::optional<OperatorScope> scope_;
};

void bind_device(py::module_& module) {
  module.def("install_cards", &install_cards);
  module.def("register_operators", &register_operators);
  module.def("set_native_operators", &set_native_operators);
  module.def("device_count", &card_count);
  module.def("check_card", &check_card);
  module.def("is_in_bad_fork", &is_in_bad_fork);
  set_warner(&warn);
  module.def("finish_backward_passes", &finish_backward_passes,
             py::call_guard<py::gil_scoped_release>());
  module.def("set_capacity", &set_capacity);
  module.def("set_poison", &set_poison);
  module.def("alias_cpu", &host_alias::host_tensor);
  module.def("require_lazy_init", [] { torch::utils::set_requires_device_init(kNPU, true); });
}

void bind_recording(py::module_& module) {
  module.def("set_stack_function", [](py::object function) {
    stack_function = function.release().ptr();
    set_stack_taker(&take_stack);
  });
  py::class_<Recording>(module, "Recording")
      .def(py::init<bool>())
      .def("start", &Recording::start)
      .def("stop", &Recording::stop)
      .def("operators", &Recording::operators)
      .def("copies", &Recording::copies)
      .def("syncs", &Recording::syncs);
  py::class_<PythonScope>(module, "OperatorScope")
      .def(py::init<std::string, const std::vector<at::Tensor>&>())
      .def("__enter__",
           [](PythonScope& scope) -> PythonScope& {
             scope.enter();
             return scope;
           })
      .def("outputs", &PythonScope::outputs)
      .def("__exit__", &PythonScope::exit);
}

void bind_hccl(py::module_& module) {
  py::module_::import("torch.distributed");  // has the base class
  py::class_<Hccl, c10d::Backend, c10::intrusive_ptr<Hccl>>(module, "HcclOverGloo")
      .def(py::init([](const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size) {
        return c10::make_intrusive<Hccl>(gloo, rank, size);
      }));
}

}  // namespace
}  // namespace npu_sim

PYBIND11_MODULE(npu_sim_backend, module) {
  npu_sim::bind_device(module);
  npu_sim::bind_recording(module);
  npu_sim::bind_hccl(module);
}
