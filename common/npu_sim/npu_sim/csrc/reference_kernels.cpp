// CPU kernels for operators that torch computes on accelerators only. The device runs them as any
// other CPU kernel. Statistics of normalisation are float32 whatever the input is.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/var_mean.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace npu_sim {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Batch normalisation over several processes, as torch.nn.SyncBatchNorm does it: N images,
// C channels, the rest are positions. Names of arguments are those of torch's schemas.

Tensor as_float(const Tensor& tensor) { return tensor.to(at::kFloat); }

// All dimensions but the channels.
std::vector<int64_t> reduced_dimensions(const Tensor& input) {
  std::vector<int64_t> dimensions;
  for (int64_t i = 0; i < input.dim(); i++) {
    if (i != 1) dimensions.push_back(i);
  }
  return dimensions;
}

// A value per channel, so that it broadcasts against the input.
Tensor per_channel(const Tensor& values, const Tensor& input) {
  std::vector<int64_t> shape(static_cast<size_t>(input.dim()), 1);
  shape[1] = input.size(1);
  return as_float(values).view(shape);
}

bool has(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

Tensor weight_or_one(const OptionalTensor& weight, const Tensor& input) {
  return has(weight) ? per_channel(*weight, input)
                     : at::ones({1}, input.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor> stats(const Tensor& input, double eps) {
  const auto dimensions = reduced_dimensions(input);
  auto [variance, mean] = at::var_mean(as_float(input), dimensions, /*unbiased=*/false);
  return {mean, (variance + eps).rsqrt()};
}

void update_running(const OptionalTensor& running, const Tensor& now, double momentum) {
  if (has(running)) running->mul_(1 - momentum).add_(now.to(running->scalar_type()), momentum);
}

// The statistics of all processes together; variance is biased, the running one is not.
std::tuple<Tensor, Tensor> finish_stats(const Tensor& mean, const Tensor& variance,
                                        const Tensor& count, const OptionalTensor& running_mean,
                                        const OptionalTensor& running_var, double momentum,
                                        double eps) {
  update_running(running_mean, mean, momentum);
  update_running(running_var, variance * (count / (count - 1)), momentum);
  return {mean, (variance + eps).rsqrt()};
}

// mean and invstd are those of P processes, (P, C); counts has their numbers of elements, (P).
std::tuple<Tensor, Tensor> gather_stats_with_counts(
    const Tensor&, const Tensor& mean, const Tensor& invstd, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double momentum, double eps, const Tensor& counts) {
  const auto weights = as_float(counts).view({-1, 1});
  const auto total = weights.sum();
  const auto all_mean = (as_float(mean) * weights).sum(0) / total;
  const auto variances = as_float(invstd).pow(-2) - eps + (as_float(mean) - all_mean).square();
  const auto variance = (variances * weights).sum(0) / total;
  return finish_stats(all_mean, variance, total, running_mean, running_var, momentum, eps);
}

// torch_npu's SyncBatchNorm exchanges sums and sums of squares instead, in float32.
std::tuple<Tensor, Tensor> npu_reduce(const Tensor& input, double) {
  const auto values = as_float(input);
  const auto dimensions = reduced_dimensions(input);
  return {values.sum(dimensions), values.square().sum(dimensions)};
}

std::tuple<Tensor, Tensor> npu_gather_stats_update(
    const Tensor&, const Tensor& sums, const Tensor& square_sums,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
    double eps, const Tensor& counts) {
  const auto total = as_float(counts).sum();
  const auto mean = as_float(sums).sum(0) / total;
  const auto variance = as_float(square_sums).sum(0) / total - mean.square();
  return finish_stats(mean, variance.clamp_min(0), total, running_mean, running_var, momentum,
                      eps);
}

Tensor normalise(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const Tensor& mean, const Tensor& invstd, double) {
  auto normalised = (as_float(input) - per_channel(mean, input)) * per_channel(invstd, input) *
                    weight_or_one(weight, input);
  if (has(bias)) normalised = normalised + per_channel(*bias, input);
  return normalised.to(input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(
    const Tensor& grad_out, const Tensor& input, const Tensor& mean, const Tensor& invstd,
    const OptionalTensor& weight, bool input_g, bool weight_g, bool bias_g) {
  const auto dimensions = reduced_dimensions(input);
  const auto gradient = as_float(grad_out);
  const auto sum_dy = gradient.sum(dimensions);
  const auto sum_dy_xmu =
      (gradient * (as_float(input) - per_channel(mean, input))).sum(dimensions);
  const auto dtype = has(weight) ? weight->scalar_type() : at::kFloat;
  return {input_g ? sum_dy : Tensor(), input_g ? sum_dy_xmu : Tensor(),
          weight_g ? (sum_dy_xmu * invstd).to(dtype) : Tensor(),
          bias_g ? sum_dy.to(dtype) : Tensor()};
}

Tensor backward_elemt(const Tensor& grad_out, const Tensor& input, const Tensor& mean,
                      const Tensor& invstd, const OptionalTensor& weight, const Tensor& sum_dy,
                      const Tensor& sum_dy_xmu, const Tensor& count) {
  const auto total = as_float(count).sum();
  const auto scale = per_channel(invstd, input);
  const auto mean_dy = per_channel(sum_dy / total, input);
  const auto mean_dy_xmu = per_channel(sum_dy_xmu / total, input);
  const auto centred = as_float(input) - per_channel(mean, input);
  const auto gradient = (as_float(grad_out) - mean_dy - centred * scale.square() * mean_dy_xmu) *
                        scale * weight_or_one(weight, input);
  return gradient.to(input.scalar_type());
}

// ---- Convolution. torch's decomposition calls these two on a backend that it does not know.

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
  return at::convolution(input, weight, bias, stride, padding, dilation, transposed,
                         output_padding, groups);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> output_mask) {
  const std::vector<int64_t> bias_size = {grad_output.size(1)};
  return at::convolution_backward(grad_output, input, weight, bias_size, stride, padding,
                                  dilation, transposed, output_padding, groups, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("batch_norm_stats", stats);
  library.impl("batch_norm_gather_stats_with_counts", gather_stats_with_counts);
  library.impl("batch_norm_elemt", normalise);
  library.impl("batch_norm_backward_reduce", backward_reduce);
  library.impl("batch_norm_backward_elemt", backward_elemt);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(npu, CPU, library) {
  library.impl("batch_norm_reduce", npu_reduce);
  library.impl("batch_norm_gather_stats_update", npu_gather_stats_update);
}

}  // namespace npu_sim
