#include "memory.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

#include "generator.h"

namespace npu_sim {
namespace {

using c10::CachingAllocator::StatArray;
using c10::CachingAllocator::StatType;
using c10::CachingAllocator::format_size;
using c10::CachingDeviceAllocator::DeviceStats;

constexpr size_t kRounding = 512;          // torch_npu's blocks are multiples of this
constexpr size_t kSmallPoolMost = 1 << 20;  // and its small pool has blocks up to this
constexpr size_t kAlignment = 64;

size_t block_bytes(size_t bytes) { return (bytes + kRounding - 1) / kRounding * kRounding; }

void* host_bytes(size_t bytes) {
  void* data = nullptr;
  TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, kAlignment, bytes) == 0,
                   "the host has no memory for ", format_size(bytes), " of the simulated NPU");
  return data;
}

// The card's allocator. It keeps no freed memory, so what is reserved is what is allocated.
class CardAllocator final : public c10::DeviceAllocator {
 public:
  std::mutex mutex;  // held over a fork, so that a child finds it free
  std::atomic<int> poison{-1};

  c10::DataPtr allocate(size_t bytes) override { return allocate_on(bytes, current_card()); }

  c10::DataPtr allocate_on(size_t bytes, DeviceIndex card) {
    const Device device(kNPU, card);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    book(card, bytes);
    void* data = nullptr;
    try {
      data = host_bytes(bytes);
    } catch (...) {
      unbook({card, bytes});
      throw;
    }
    if (poison >= 0) std::memset(data, poison, bytes);
    remember(data, {card, bytes});
    return {data, data, &release, device};
  }

  c10::DataPtr adopt(const c10::Storage& cpu, DeviceIndex card) {
    auto* data = cpu.mutable_data();
    const auto bytes = cpu.nbytes();
    const Device device(kNPU, card);
    if (bytes == 0 || !data) return {nullptr, nullptr, &release, device};
    book(card, bytes);
    remember(data, {card, bytes});
    auto let_go = [](void* context) {
      auto* storage = static_cast<c10::Storage*>(context);
      instance().forget(storage->mutable_data());
      delete storage;
    };
    return {data, new c10::Storage(cpu), let_go, device};
  }

  DeviceIndex card_of_address(void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto block = live_.find(data);
    TORCH_CHECK(block != live_.end(), "this address is not the start of memory of an NPU");
    return block->second.card;
  }

  void set_capacity(DeviceIndex card, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    cards_[card].capacity = bytes;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  DeviceStats getDeviceStats(DeviceIndex card) override {
    std::lock_guard<std::mutex> lock(mutex);
    return state_of(card).stats;
  }
  void resetAccumulatedStats(DeviceIndex card) override {
    std::lock_guard<std::mutex> lock(mutex);
    for_each_statistic(state_of(card).stats, [](auto& one) { one.reset_accumulated(); });
    state_of(card).stats.num_ooms = 0;
  }
  void resetPeakStats(DeviceIndex card) override {
    std::lock_guard<std::mutex> lock(mutex);
    for_each_statistic(state_of(card).stats, [](auto& one) { one.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex card) override {
    std::lock_guard<std::mutex> lock(mutex);
    const auto used = allocated(state_of(card));
    const auto capacity = state_of(card).capacity;
    return {capacity > used ? capacity - used : 0, capacity};
  }

  static CardAllocator& instance() {
    static auto* allocator = new CardAllocator();  // tensors may outlive static objects
    return *allocator;
  }

 private:
  struct Block {
    DeviceIndex card;
    size_t bytes;
  };
  struct Card {
    DeviceStats stats;
    size_t capacity = 0;
  };

  Card& state_of(DeviceIndex card) {
    check_card(card);
    return cards_[card];
  }

  static size_t allocated(const Card& card) {
    return static_cast<size_t>(
        card.stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)].current);
  }

  template <class Function>
  static void for_each_statistic(DeviceStats& stats, Function change) {
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                       &stats.requested_bytes, &stats.allocation, &stats.active, &stats.segment}) {
      for (auto& one : *kind) change(one);
    }
  }

  static void count(DeviceStats& stats, const Block& block, bool added) {
    const auto pool = block.bytes <= kSmallPoolMost ? StatType::SMALL_POOL : StatType::LARGE_POOL;
    auto change = [&](StatArray& statistic, size_t amount) {
      for (const auto type : {StatType::AGGREGATE, pool}) {
        auto& one = statistic[static_cast<size_t>(type)];
        added ? one.increase(amount) : one.decrease(amount);
      }
    };
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      change(*bytes, block_bytes(block.bytes));
    }
    change(stats.requested_bytes, block.bytes);
    for (auto* number : {&stats.allocation, &stats.active, &stats.segment}) change(*number, 1);
    added ? stats.num_device_alloc++ : stats.num_device_free++;
  }

  void book(DeviceIndex card, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto& of_card = state_of(card);
    const auto used = allocated(of_card);
    if (used + block_bytes(bytes) > of_card.capacity) {
      of_card.stats.num_ooms++;
      const auto free = of_card.capacity > used ? of_card.capacity - used : 0;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", format_size(bytes),
          " (NPU ", static_cast<int>(card), "; ", format_size(of_card.capacity),
          " total capacity; ", format_size(used), " already allocated; ", format_size(used),
          " current active; ", format_size(free), " free; ", format_size(used),
          " reserved in total by PyTorch)");
    }
    count(of_card.stats, {card, bytes}, true);
  }

  void unbook(const Block& block) {
    std::lock_guard<std::mutex> lock(mutex);
    count(cards_[block.card].stats, block, false);
  }

  void remember(void* data, const Block& block) {
    std::lock_guard<std::mutex> lock(mutex);
    live_[data] = block;
  }

  void forget(void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto block = live_.find(data);
    if (block == live_.end()) return;
    count(cards_[block->second.card].stats, block->second, false);
    live_.erase(block);
  }

  static void release(void* data) {
    if (!data) return;
    instance().forget(data);
    std::free(data);
  }

  Card cards_[kMostCards];
  std::unordered_map<void*, Block> live_;
};

// Host memory that counts as pinned: nothing is locked, it is only told apart.
class PinnedAllocator final : public at::HostAllocator {
 public:
  std::mutex mutex;

  c10::DataPtr allocate(size_t bytes) override {
    bytes = std::max<size_t>(bytes, 1);  // an empty tensor is pinned too, by its address
    auto* data = static_cast<char*>(host_bytes(bytes));
    std::lock_guard<std::mutex> lock(mutex);
    live_[data] = bytes;
    return {data, data, &release, Device(c10::kCPU)};
  }

  bool contains(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto* byte = static_cast<const char*>(data);
    auto block = live_.upper_bound(byte);
    if (block == live_.begin()) return false;
    --block;
    return byte < block->first + block->second;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

  static PinnedAllocator& instance() {
    static auto* allocator = new PinnedAllocator();
    return *allocator;
  }

 private:
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(instance().mutex);
      instance().live_.erase(static_cast<const char*>(data));
    }
    std::free(data);
  }

  std::map<const char*, size_t> live_;
};

void lock_all() {
  CardAllocator::instance().mutex.lock();
  PinnedAllocator::instance().mutex.lock();
}

void unlock_all() {
  PinnedAllocator::instance().mutex.unlock();
  CardAllocator::instance().mutex.unlock();
}

class AdoptingMemory final : public host_alias::DeviceMemory {
 public:
  at::Tensor adopt(const at::Tensor& cpu, Device device) override {
    auto storage = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), cpu.storage().nbytes(),
        adopt_bytes(cpu.storage(), device.index()), card_allocator(), /*resizable=*/true);
    return host_alias::tensor_over(std::move(storage), cpu, c10::DispatchKey::PrivateUse1);
  }
  at::Tensor view(const at::Tensor& base, const at::Tensor& cpu) override {
    // With the base's keys: in inference mode, a view of a usual tensor is a usual tensor.
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), cpu.dtype());
    auto* implementation = tensor.unsafeGetTensorImpl();
    implementation->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    implementation->_set_conj(cpu.is_conj());
    implementation->_set_neg(cpu.is_neg());
    return tensor;
  }
  void resized(const at::Tensor& tensor, const at::Tensor& cpu, bool moved) override {
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    // Of several arguments over one storage, the first moves it.
    if (moved && storage->data() != cpu.storage().data()) {
      storage->set_data_ptr_noswap(adopt_bytes(cpu.storage(), storage->device().index()));
      storage->set_nbytes(cpu.storage().nbytes());
    }
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                        cpu.storage_offset());
  }
  at::Generator host_generator(const at::Generator& generator) override {
    return npu_sim::host_generator(generator);
  }
};

}  // namespace

void install_memory() {
  c10::SetAllocator(kNPU, &CardAllocator::instance());
  at::setHostAllocator(kNPU, &PinnedAllocator::instance());
  pthread_atfork(lock_all, unlock_all, unlock_all);
}

c10::Allocator* card_allocator() { return &CardAllocator::instance(); }
c10::Allocator* pinned_allocator() { return &PinnedAllocator::instance(); }
bool is_pinned(const void* data) { return PinnedAllocator::instance().contains(data); }
DeviceIndex card_of_address(void* data) { return CardAllocator::instance().card_of_address(data); }

void set_capacity(DeviceIndex card, size_t bytes) {
  check_card(card);
  CardAllocator::instance().set_capacity(card, bytes);
}

void set_poison(std::optional<uint8_t> byte) {
  CardAllocator::instance().poison = byte ? *byte : -1;
}

c10::DataPtr adopt_bytes(const c10::Storage& cpu, DeviceIndex card) {
  return CardAllocator::instance().adopt(cpu, card);
}

c10::Storage empty_storage(DeviceIndex card) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), 0, CardAllocator::instance().allocate_on(0, card),
      card_allocator(), /*resizable=*/true);
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto* implementation = storage.unsafeGetStorageImpl();
  auto data = CardAllocator::instance().allocate_on(bytes, storage.device().index());
  if (storage.data() && data.get()) {
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
  }
  implementation->set_data_ptr_noswap(std::move(data));
  implementation->set_nbytes(bytes);
}

host_alias::DeviceMemory& adopting_memory() {
  static auto* memory = new AdoptingMemory();
  return *memory;
}

}  // namespace npu_sim
