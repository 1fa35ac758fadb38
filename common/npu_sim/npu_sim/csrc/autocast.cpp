// What autocast does on the device: the operators, and the groups, of torch_npu's own table. It
// differs from torch's table for other devices, so those lists are of no use here.
#include <ATen/Operators.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace npu_sim {
namespace {

// torch's macros name these without their namespaces.
using namespace at::autocast;
using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;

Tensor refuse_binary_cross_entropy(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                   int64_t) {
  TORCH_CHECK(false, "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to "
              "autocast: use binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss, "
              "which take what comes before the sigmoid");
}

// Runs in float16 or bfloat16.
#define NPU_SIM_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
// Runs in float32.
#define NPU_SIM_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
// Gives float32, unless the caller asks for a dtype.
#define NPU_SIM_FLOAT32_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
// Runs in the widest type of its arguments.
#define NPU_SIM_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

void register_lower_precision(torch::Library& m) {
  NPU_SIM_LOWER(_convolution)
  NPU_SIM_LOWER(_convolution, deprecated)
  NPU_SIM_LOWER(_scaled_dot_product_flash_attention)
  NPU_SIM_LOWER(_thnn_fused_gru_cell)
  NPU_SIM_LOWER(_thnn_fused_lstm_cell)
  NPU_SIM_LOWER(addbmm)
  NPU_SIM_LOWER(addmm)
  NPU_SIM_LOWER(addmv)
  NPU_SIM_LOWER(addr)
  NPU_SIM_LOWER(baddbmm)
  NPU_SIM_LOWER(bmm)
  NPU_SIM_LOWER(chain_matmul)
  NPU_SIM_LOWER(conv1d)
  NPU_SIM_LOWER(conv2d)
  NPU_SIM_LOWER(conv3d)
  NPU_SIM_LOWER(conv_tbc)
  NPU_SIM_LOWER(conv_transpose1d)
  NPU_SIM_LOWER(conv_transpose2d, input)
  NPU_SIM_LOWER(conv_transpose3d, input)
  NPU_SIM_LOWER(convolution)
  NPU_SIM_LOWER(cudnn_convolution)
  NPU_SIM_LOWER(cudnn_convolution_transpose)
  NPU_SIM_LOWER(einsum)
  NPU_SIM_LOWER(gru_cell)
  NPU_SIM_LOWER(linalg_multi_dot)
  NPU_SIM_LOWER(linear)
  NPU_SIM_LOWER(lstm_cell)
  NPU_SIM_LOWER(matmul)
  NPU_SIM_LOWER(mm)
  NPU_SIM_LOWER(mv)
  NPU_SIM_LOWER(prelu)
  NPU_SIM_LOWER(rnn_relu_cell)
  NPU_SIM_LOWER(rnn_tanh_cell)
  NPU_SIM_LOWER(scaled_dot_product_attention)
}

void register_float32(torch::Library& m) {
  NPU_SIM_FLOAT32(acos)
  NPU_SIM_FLOAT32(asin)
  NPU_SIM_FLOAT32(binary_cross_entropy_with_logits)
  NPU_SIM_FLOAT32(cdist)
  NPU_SIM_FLOAT32(cosh)
  NPU_SIM_FLOAT32(cosine_embedding_loss)
  NPU_SIM_FLOAT32(cosine_similarity)
  NPU_SIM_FLOAT32(dist)
  NPU_SIM_FLOAT32(erfinv)
  NPU_SIM_FLOAT32(exp)
  NPU_SIM_FLOAT32(expm1)
  NPU_SIM_FLOAT32(frobenius_norm, dim)
  NPU_SIM_FLOAT32(group_norm)
  NPU_SIM_FLOAT32(hinge_embedding_loss)
  NPU_SIM_FLOAT32(huber_loss)
  NPU_SIM_FLOAT32(kl_div)
  NPU_SIM_FLOAT32(l1_loss)
  NPU_SIM_FLOAT32(layer_norm)
  NPU_SIM_FLOAT32(log)
  NPU_SIM_FLOAT32(log10)
  NPU_SIM_FLOAT32(log1p)
  NPU_SIM_FLOAT32(log2)
  NPU_SIM_FLOAT32(logsumexp)
  NPU_SIM_FLOAT32(margin_ranking_loss)
  NPU_SIM_FLOAT32(mse_loss)
  NPU_SIM_FLOAT32(multi_margin_loss)
  NPU_SIM_FLOAT32(multilabel_margin_loss)
  NPU_SIM_FLOAT32(native_layer_norm)
  NPU_SIM_FLOAT32(nll_loss)
  NPU_SIM_FLOAT32(nll_loss2d)
  NPU_SIM_FLOAT32(nuclear_norm)
  NPU_SIM_FLOAT32(nuclear_norm, dim)
  NPU_SIM_FLOAT32(pdist)
  NPU_SIM_FLOAT32(poisson_nll_loss)
  NPU_SIM_FLOAT32(pow, Scalar)
  NPU_SIM_FLOAT32(pow, Tensor_Scalar)
  NPU_SIM_FLOAT32(pow, Tensor_Tensor)
  NPU_SIM_FLOAT32(reciprocal)
  NPU_SIM_FLOAT32(renorm)
  NPU_SIM_FLOAT32(rsqrt)
  NPU_SIM_FLOAT32(sinh)
  NPU_SIM_FLOAT32(smooth_l1_loss)
  NPU_SIM_FLOAT32(soft_margin_loss)
  NPU_SIM_FLOAT32(softplus)
  NPU_SIM_FLOAT32(tan)
  NPU_SIM_FLOAT32(triplet_margin_loss)
}

void register_float32_results(torch::Library& m) {
  NPU_SIM_FLOAT32_RESULT(cumprod)
  NPU_SIM_FLOAT32_RESULT(cumsum)
  NPU_SIM_FLOAT32_RESULT(linalg_matrix_norm)
  NPU_SIM_FLOAT32_RESULT(linalg_matrix_norm, str_ord)
  NPU_SIM_FLOAT32_RESULT(linalg_vector_norm)
  NPU_SIM_FLOAT32_RESULT(log_softmax, int)
  NPU_SIM_FLOAT32_RESULT(prod)
  NPU_SIM_FLOAT32_RESULT(prod, dim_int)
  NPU_SIM_FLOAT32_RESULT(softmax, int)
  NPU_SIM_FLOAT32_RESULT(sum)
  NPU_SIM_FLOAT32_RESULT(sum, dim_IntList)
  // These have a form with a dtype, which autocast calls in place of the one without.
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
}

void register_widest(torch::Library& m) {
  NPU_SIM_WIDEST(addcdiv)
  NPU_SIM_WIDEST(addcmul)
  NPU_SIM_WIDEST(atan2)
  NPU_SIM_WIDEST(bilinear)
  NPU_SIM_WIDEST(cross)
  NPU_SIM_WIDEST(dot)
  NPU_SIM_WIDEST(grid_sampler)
  NPU_SIM_WIDEST(index_put)
  NPU_SIM_WIDEST(scatter_add)
  NPU_SIM_WIDEST(tensordot)
}

}  // namespace

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  register_lower_precision(m);
  register_float32(m);
  register_float32_results(m);
  register_widest(m);
  m.impl("binary_cross_entropy", refuse_binary_cross_entropy);
}

}  // namespace npu_sim
