// CPU kernels of kernels/batch_norm.py: fp32, activations [N, C, H, W] in channels_last, here
// [P, C] with a row a pixel.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 64;                    // pixels whose sums are fp32
constexpr int64_t kElementsPerThread = 1 << 15;  // less is not worth waking a thread

Tensor empty(std::vector<int64_t> shape) {
  return torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
}

// fp32 values of a tensor, `count` of them; the tensor is held as long as this lives.
class Values {
 public:
  Values(const Tensor& tensor, int64_t count, MemoryFormat format = MemoryFormat::Contiguous)
      : tensor_(torch::stable::contiguous(tensor, format)) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count,
                    "expected ", count, " fp32 values, got ", tensor.numel());
    data_ = tensor_.const_data_ptr<float>();
  }
  const float* data() const { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor tensor_;
  const float* data_;
};

// Statistics --------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> affine(const Tensor& sums, const Tensor& squared_sums,
                                                  const Tensor& weight, const Tensor& bias,
                                                  int64_t count, double eps) {
  const int64_t channels = sums.numel();
  const Values sum(sums, channels), square(squared_sums, channels), gain(weight, channels),
      offset(bias, channels);
  Tensor scale = empty({channels}), shift = empty({channels}), mean = empty({channels}),
         var = empty({channels});
  float* scales = scale.mutable_data_ptr<float>();
  float* shifts = shift.mutable_data_ptr<float>();
  float* means = mean.mutable_data_ptr<float>();
  float* vars = var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double m = sum[c] / static_cast<double>(count);
    const double v = std::max(square[c] / static_cast<double>(count) - m * m, 0.0);
    const double s = gain[c] / std::sqrt(v + eps);
    scales[c] = static_cast<float>(s);
    shifts[c] = static_cast<float>(offset[c] - m * s);
    means[c] = static_cast<float>(m);
    vars[c] = static_cast<float>(v);
  }
  return {scale, shift, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_backward(const Tensor& grad_scale,
                                                           const Tensor& grad_shift,
                                                           const Tensor& mean, const Tensor& var,
                                                           const Tensor& weight, int64_t count,
                                                           double eps) {
  const int64_t channels = mean.numel();
  const Values d_scale(grad_scale, channels), d_shift(grad_shift, channels), m(mean, channels),
      v(var, channels), gain(weight, channels);
  Tensor sums = empty({channels}), squares = empty({channels}), weights = empty({channels}),
         biases = empty({channels});
  float* d_sum = sums.mutable_data_ptr<float>();
  float* d_square = squares.mutable_data_ptr<float>();
  float* d_weight = weights.mutable_data_ptr<float>();
  float* d_bias = biases.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double r = 1 / std::sqrt(v[c] + eps);
    const double through_scale = d_scale[c] - static_cast<double>(d_shift[c]) * m[c];
    const double d_var = -0.5 * r * r * r * gain[c] * through_scale;
    const double d_mean = -static_cast<double>(d_shift[c]) * gain[c] * r;
    d_sum[c] = static_cast<float>((d_mean - 2 * m[c] * d_var) / count);
    d_square[c] = static_cast<float>(d_var / count);
    d_weight[c] = static_cast<float>(through_scale * r);
    d_bias[c] = d_shift[c];
  }
  return {sums, squares, weights, biases};
}

// Application -------------------------------------------------------------------------------------

DFPTKD_CLONES
void apply_rows(const float* __restrict x, const float* __restrict scale,
                const float* __restrict shift, float floor, int64_t rows, int64_t channels,
                float* __restrict y) {
  for (int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float a = x[c] * scale[c] + shift[c];
      y[c] = a < floor ? floor : a;  // keeps NaN
    }
  }
}

// Writes grad_x and adds to sums [2, channels].
DFPTKD_CLONES
void apply_backward_rows(const float* __restrict grad_y, const float* __restrict x,
                         const float* __restrict scale, const float* __restrict shift, float floor,
                         int64_t rows, int64_t channels, float* __restrict grad_x,
                         float* __restrict sums) {
  float* __restrict d_scale = sums;
  float* __restrict d_shift = sums + channels;
  for (int64_t r = 0; r < rows; ++r, x += channels, grad_y += channels, grad_x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float da = x[c] * scale[c] + shift[c] <= floor ? 0.0f : grad_y[c];
      d_scale[c] += da * x[c];
      d_shift[c] += da;
      grad_x[c] = da * scale[c];
    }
  }
}

float floor_of(bool relu) { return relu ? 0 : -std::numeric_limits<float>::infinity(); }

Values pixels_of(const Tensor& activation, int64_t count) {
  STD_TORCH_CHECK(activation.dim() == 4, "expected [N, C, H, W]");
  return {activation, count, MemoryFormat::ChannelsLast};
}

Tensor like(const Tensor& x) {
  return dfptkd::empty_activation(x.size(0), x.size(1), x.size(2), x.size(3));
}

Tensor apply(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu) {
  const Values values = pixels_of(x, x.numel());
  const int64_t channels = x.size(1), pixels = x.numel() / std::max<int64_t>(channels, 1);
  const Values scales(scale, channels), shifts(shift, channels);
  Tensor y = like(x);
  float* out = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, pixels, kElementsPerThread / channels + 1, [&](int64_t begin, int64_t end) {
        apply_rows(values.data() + begin * channels, scales.data(), shifts.data(), floor_of(relu),
                   end - begin, channels, out + begin * channels);
      });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& grad_y, const Tensor& x,
                                                  const Tensor& scale, const Tensor& shift,
                                                  bool relu) {
  const Values grads = pixels_of(grad_y, x.numel()), values = pixels_of(x, x.numel());
  const int64_t channels = x.size(1), pixels = x.numel() / std::max<int64_t>(channels, 1);
  const Values scales(scale, channels), shifts(shift, channels);
  Tensor grad_x = like(x), grad_scale = empty({channels}), grad_shift = empty({channels});
  float* out = grad_x.mutable_data_ptr<float>();
  const int64_t chunks = std::clamp<int64_t>(x.numel() / kElementsPerThread, 1,
                                             torch::stable::get_num_threads());
  std::vector<double> totals(chunks * 2 * channels);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(2 * channels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = pixels * (i + 1) / chunks;
      for (int64_t p = pixels * i / chunks; p < last; p += kTile) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        apply_backward_rows(grads.data() + p * channels, values.data() + p * channels,
                            scales.data(), shifts.data(), floor_of(relu),
                            std::min(kTile, last - p), channels, out + p * channels, sums.data());
        for (int64_t c = 0; c < 2 * channels; ++c) {
          totals[i * 2 * channels + c] += sums[c];
        }
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double d_scale = 0, d_shift = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      d_scale += totals[i * 2 * channels + c];
      d_shift += totals[(i * 2 + 1) * channels + c];
    }
    grad_scale.mutable_data_ptr<float>()[c] = static_cast<float>(d_scale);
    grad_shift.mutable_data_ptr<float>()[c] = static_cast<float>(d_shift);
  }
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("batch_norm_affine_native", TORCH_BOX(&affine));
  m.impl("batch_norm_affine_backward_native", TORCH_BOX(&affine_backward));
  m.impl("affine_relu_native", TORCH_BOX(&apply));
  m.impl("affine_relu_backward_native", TORCH_BOX(&apply_backward));
}
