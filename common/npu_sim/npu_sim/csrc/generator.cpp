#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GeneratorImpl.h>

#include <vector>

namespace npu_sim {
namespace {

// A CPU generator of its own that goes by a card's name: the kernels that draw are the CPU's.
class CardGenerator final : public c10::GeneratorImpl {
 public:
  explicit CardGenerator(DeviceIndex card)
      : GeneratorImpl(Device(kNPU, card), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::make_generator<at::CPUGeneratorImpl>()) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  void set_offset(uint64_t) override { refuse_offset(); }
  uint64_t get_offset() const override { refuse_offset(); }
  CardGenerator* clone_impl() const override {
    auto* copy = new CardGenerator(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }

  at::Generator cpu;

 private:
  [[noreturn]] static void refuse_offset() {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "a generator of the simulated NPU has no offset: save and "
                                "restore its state instead");
  }
};

}  // namespace

const at::Generator& default_generator(DeviceIndex card) {
  // Never destroyed: threads may draw while the process ends.
  static const auto* generators = [] {
    auto* all = new std::vector<at::Generator>();
    for (DeviceIndex i = 0; i < kMostCards; i++) {
      all->push_back(at::make_generator<CardGenerator>(i));
    }
    return all;
  }();
  require_card();
  check_card(card);
  return (*generators)[card];
}

at::Generator new_generator(DeviceIndex card) {
  require_card();
  check_card(card);
  return at::make_generator<CardGenerator>(card);
}

at::Generator host_generator(const at::Generator& generator) {
  return static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

}  // namespace npu_sim
