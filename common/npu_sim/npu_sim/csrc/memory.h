// Memory of the cards, and pinned memory of the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include "device.h"
#include "host_alias.h"

namespace npu_sim {

// Registers both allocators.
void install_memory();

c10::Allocator* card_allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);
DeviceIndex card_of_address(void* data);

// A card's size in bytes; more is an out-of-memory error.
void set_capacity(DeviceIndex card, size_t bytes);

// Fills fresh memory with this byte; without one it is left as it comes.
void set_poison(std::optional<uint8_t> byte);

// Memory that a CPU kernel has allocated becomes the card's, and counts as such.
c10::DataPtr adopt_bytes(const c10::Storage& cpu, DeviceIndex card);

c10::Storage empty_storage(DeviceIndex card);
void resize_storage(const c10::Storage& storage, size_t bytes);

// Hands results of CPU kernels to the cards without a copy.
host_alias::DeviceMemory& adopting_memory();

}  // namespace npu_sim
