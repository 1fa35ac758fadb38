#include "device.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/ones.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "generator.h"
#include "memory.h"
#include "record.h"

namespace npu_sim {
namespace {

DeviceIndex cards = 0;
std::atomic<bool> card_was_used{false};
std::atomic<bool> forked_after_use{false};
thread_local DeviceIndex current = 0;
thread_local c10::StreamId current_streams[kMostCards] = {};

// All work is done when a call returns, so an event is the time at which it was recorded.
struct Event {
  std::chrono::steady_clock::time_point time;
};

// The card of a device with or without an index, without a check.
Device with_index(Device device) {
  return {kNPU, device.has_index() ? device.index() : current};
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kNPU; }
  DeviceIndex deviceCount() const noexcept override { return cards; }
  Device getDevice() const override { return {kNPU, current}; }
  Device exchangeDevice(Device device) const override {
    const auto previous = getDevice();
    setDevice(device);
    return previous;
  }
  void setDevice(Device device) const override {
    if (device.has_index()) set_current_card(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }

  c10::Stream getStream(Device device) const override {
    const auto card = with_index(device);
    return c10::Stream(c10::Stream::UNSAFE, card, current_streams[card.index()]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, with_index(device), 0);
  }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> next{1};
    require_card();
    return c10::Stream(c10::Stream::UNSAFE, with_index(device), next++);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto previous = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return previous;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { record_sync("stream"); }
  void synchronizeDevice(const DeviceIndex) const override {
    require_card();
    record_sync("synchronize");
  }

  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    require_card();
    if (!*event) *event = new Event();
    static_cast<Event*>(*event)->time = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { record_sync("event"); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    const auto time = static_cast<Event*>(end)->time - static_cast<Event*>(start)->time;
    return std::chrono::duration<double, std::milli>(time).count();
  }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return cards > 0; }
  bool hasPrimaryContext(DeviceIndex card) const override { return card < cards; }
  DeviceIndex deviceCount() const override { return cards; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex card) const override { set_current_card(card); }
  DeviceIndex exchangeDevice(DeviceIndex card) const override {
    const auto previous = current;
    set_current_card(card);
    return previous;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex card) const override {
    return card < 0 ? current : exchangeDevice(card);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex card) const override {
    return default_generator(card < 0 ? current : card);
  }
  at::Generator getNewGenerator(DeviceIndex card) const override {
    return new_generator(card < 0 ? current : card);
  }
  Device getDeviceFromPtr(void* data) const override { return {kNPU, card_of_address(data)}; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

void after_fork_in_child() {
  if (card_was_used) forked_after_use = true;
}

}  // namespace

void install_cards(DeviceIndex count) {
  cards = count;
  install_memory();
  c10::impl::registerDeviceGuard(kNPU, new Guard());
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
}

DeviceIndex card_count() { return cards; }
DeviceIndex current_card() { return current; }

void set_current_card(DeviceIndex card) {
  require_card();
  check_card(card);
  current = card;
}

void require_card() {
  TORCH_CHECK(!forked_after_use,
              "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you "
              "must use the 'spawn' start method");
  TORCH_CHECK(cards > 0, "No NPUs are available\n[ERROR] ERR00009 PTA resource unavailable");
  card_was_used = true;
}

void check_card(DeviceIndex card) {
  TORCH_CHECK(card >= 0 && card < cards, "Invalid device: npu:", static_cast<int>(card),
              " is not there, this machine has ", static_cast<int>(cards),
              " NPU(s), counted from 0");
}

DeviceIndex card_of(std::optional<Device> device) {
  require_card();
  const auto card = device && device->has_index() ? device->index() : current;
  check_card(card);
  return card;
}

void finish_backward_passes() {
  if (!card_was_used || forked_after_use) return;
  // Each card's thread does one thing after another, so a last pass comes after the end of all
  // others. Started from a thread that Python does not know, it holds nothing of Python's.
  std::thread([] {
    for (DeviceIndex card = 0; card < cards; card++) {
      try {
        const auto options = at::TensorOptions().device(kNPU, card).requires_grad(true);
        at::ones({1}, options).sum().backward();
      } catch (const c10::Error&) {
        // The card's memory is full: this one's thread is left as it is.
      }
    }
  }).join();
}

bool is_in_bad_fork() { return forked_after_use; }

CardGuard::CardGuard(DeviceIndex card) : previous_(current) { current = card; }
CardGuard::~CardGuard() { current = previous_; }

}  // namespace npu_sim
