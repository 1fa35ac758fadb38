// The operators of the device: which are native, and how each is run.
#pragma once

#include <optional>
#include <string>
#include <unordered_set>

namespace npu_sim {

using OperatorNames = std::unordered_set<std::string>;

// Gives the device a kernel for every operator of torch that it can run.
//
// Most operators reach the device as they are, and torch takes some apart before that, the
// "implicit composites". torch_npu has kernels for some of those too: `whole` names them, and
// they are kept whole.
void register_operators(const OperatorNames& whole);

// The device behaves as a torch_npu with kernels for these operators only; without names all are
// native. Each operator that falls back warns anew.
void set_native_operators(std::optional<OperatorNames> names);

// Who is told of an operator that falls back; may throw, where warnings are errors.
void set_warner(void (*warn)(const std::string& message));

}  // namespace npu_sim
