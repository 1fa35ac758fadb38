// The cards: how many there are, which is current, and whether this process may use them.
#pragma once

#include <c10/core/Device.h>

#include <optional>

namespace npu_sim {

using c10::Device;
using c10::DeviceIndex;

constexpr auto kNPU = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kMostCards = 16;  // as many as a server of Ascend cards has

// Makes torch know the cards; once a process.
void install_cards(DeviceIndex count);

DeviceIndex card_count();
DeviceIndex current_card();
void set_current_card(DeviceIndex card);

// Throws as torch_npu does where there is no card, or in a process that was forked from one that
// had used a card; notes that this process has used one.
void require_card();

// Throws unless the card exists.
void check_card(DeviceIndex card);

// The card that `device` means; without an index, the current one.
DeviceIndex card_of(std::optional<Device> device);

// Whether this process was forked from one that had used a card.
bool is_in_bad_fork();

// Waits until autograd's threads of the cards have let go of the last backward pass.
//
// A thread that still does so while Python ends asks for the GIL, is ended by Python, and takes the
// process with it (SIGABRT); a program that ends right after a backward pass would fail now and
// then. Called without the GIL.
void finish_backward_passes();

// Makes `card` the current one while it lives.
class CardGuard {
 public:
  explicit CardGuard(DeviceIndex card);
  CardGuard(const CardGuard&) = delete;
  CardGuard& operator=(const CardGuard&) = delete;
  ~CardGuard();

 private:
  DeviceIndex previous_;
};

}  // namespace npu_sim
