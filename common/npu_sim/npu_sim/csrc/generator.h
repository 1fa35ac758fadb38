// Generators of random numbers: one a card, and those that a program makes.
#pragma once

#include <ATen/core/Generator.h>

#include "device.h"

namespace npu_sim {

const at::Generator& default_generator(DeviceIndex card);
at::Generator new_generator(DeviceIndex card);

// The CPU generator that a generator of the device draws from.
at::Generator host_generator(const at::Generator& generator);

}  // namespace npu_sim
