// CPU kernels of dfptkd::frozen_relu_forward and dfptkd::frozen_relu_backward; schema and semantics
// are those of kernels/frozen_relu.py.
//
//   y[i] = min(max(x[i], 0), limit)         bit i % 8 of byte i / 8:  0 < x[i] < limit, or NaN
//   grad_x[i] = bit i ? grad_y[i] : 0
//
// i counts elements in memory order, whatever the layout. Both loops move memory and little else.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static_assert(std::endian::native == std::endian::little, "pack and unpack count on it");

constexpr int64_t kBlock = 64;               // elements whose bits are made together
constexpr int64_t kBytesPerThread = 1 << 12;  // of bits, 8 elements each: less wakes no thread

// Eight flags of 0 or 1, the first in the lowest byte -> one byte, the first in the lowest bit.
inline uint8_t pack(const uint8_t* flags) {
  uint64_t wide;
  std::memcpy(&wide, flags, sizeof wide);
  return static_cast<uint8_t>((wide * 0x0102040810204080) >> 56);
}

// The comparisons are false for NaN, which so passes through both directions, as in torch. Without
// a limit the upper one is dropped, so that infinity passes too.
template <bool kLimited>
inline float clamp(float x, float limit, uint8_t& flag) {
  const bool low = x <= 0.0f;
  const bool high = kLimited && x >= limit;
  flag = !(low | high);
  return low ? 0.0f : high ? limit : x;
}

template <bool kLimited>
inline __attribute__((always_inline)) void forward(const float* __restrict x, float* __restrict y,
                                                   uint8_t* __restrict bits, int64_t count,
                                                   float limit) {
  int64_t done = 0;
  uint8_t flags[kBlock];
  for (; done + kBlock <= count; done += kBlock) {
    for (int64_t k = 0; k < kBlock; ++k) {
      y[done + k] = clamp<kLimited>(x[done + k], limit, flags[k]);
    }
    for (int64_t k = 0; k < kBlock; k += 8) {
      bits[(done + k) / 8] = pack(flags + k);
    }
  }
  std::memset(flags, 0, sizeof flags);
  for (int64_t k = 0; done + k < count; ++k) {
    y[done + k] = clamp<kLimited>(x[done + k], limit, flags[k]);
  }
  for (int64_t k = 0; done + k < count; k += 8) {
    bits[(done + k) / 8] = pack(flags + k);
  }
}

DFPTKD_CLONES
void relu(const float* x, float* y, uint8_t* bits, int64_t count) {
  forward<false>(x, y, bits, count, 0.0f);
}

DFPTKD_CLONES
void relu_to(const float* x, float* y, uint8_t* bits, int64_t count, float limit) {
  forward<true>(x, y, bits, count, limit);
}

// Eight fp32 values as bit patterns; written out, because the compiler splits such a loop unevenly.
typedef uint32_t Lanes __attribute__((vector_size(32), aligned(4), may_alias));

// grad_x = grad_y where the bit is set; a mask and no product, so that NaN * 0 never happens.
DFPTKD_CLONES
void masked(const uint32_t* __restrict grad_y, const uint8_t* __restrict bits,
            uint32_t* __restrict grad_x, int64_t count) {
  constexpr Lanes kBits = {1, 2, 4, 8, 16, 32, 64, 128};
  int64_t done = 0;
  for (; done + 8 <= count; done += 8) {
    const auto grad = *reinterpret_cast<const Lanes*>(grad_y + done);
    const auto mask = (Lanes)((kBits & static_cast<uint32_t>(bits[done / 8])) != 0);
    *reinterpret_cast<Lanes*>(grad_x + done) = grad & mask;
  }
  for (int64_t k = 0; done + k < count; ++k) {
    grad_x[done + k] = (bits[done / 8] >> k) & 1 ? grad_y[done + k] : 0;
  }
}

// The Python side makes tensors dense; this keeps a direct call of an operator in bounds.
void check_dense(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": the native kernel takes fp32");
  int64_t span = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    span += (x.size(d) - 1) * x.stride(d);
  }
  STD_TORCH_CHECK(x.numel() == 0 || span == x.numel(), name, ": the memory must be dense");
}

// Calls part(first element, number of elements) for ranges that start at whole bytes of bits.
template <typename Part>
void for_ranges(int64_t count, const Part& part) {
  torch::stable::parallel_for(0, (count + 7) / 8, kBytesPerThread, [&](int64_t begin, int64_t end) {
    part(8 * begin, std::min(8 * end, count) - 8 * begin);
  });
}

std::tuple<Tensor, Tensor> frozen_relu_forward(const Tensor& x, std::optional<double> limit) {
  check_dense("frozen_relu: x", x);
  const int64_t count = x.numel();
  Tensor y = torch::stable::empty_like(x);
  Tensor bits = torch::stable::new_empty(x, {(count + 7) / 8}, ScalarType::Byte);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  uint8_t* kept = bits.mutable_data_ptr<uint8_t>();
  for_ranges(count, [&](int64_t first, int64_t length) {
    if (limit) {
      relu_to(from + first, to + first, kept + first / 8, length, static_cast<float>(*limit));
    } else {
      relu(from + first, to + first, kept + first / 8, length);
    }
  });
  return {y, bits};
}

Tensor frozen_relu_backward(const Tensor& grad_y, const Tensor& bits) {
  check_dense("frozen_relu: grad_y", grad_y);
  const int64_t count = grad_y.numel();
  STD_TORCH_CHECK(bits.numel() == (count + 7) / 8 && bits.scalar_type() == ScalarType::Byte,
                  "frozen_relu: bits must be uint8, a byte for 8 elements");
  Tensor grad_x = torch::stable::empty_like(grad_y);
  const auto* from = reinterpret_cast<const uint32_t*>(grad_y.const_data_ptr<float>());
  auto* to = reinterpret_cast<uint32_t*>(grad_x.mutable_data_ptr<float>());
  const uint8_t* kept = bits.const_data_ptr<uint8_t>();
  for_ranges(count, [&](int64_t first, int64_t length) {
    masked(from + first, kept + first / 8, to + first, length);
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("frozen_relu_forward", TORCH_BOX(&frozen_relu_forward));
  m.impl("frozen_relu_backward", TORCH_BOX(&frozen_relu_backward));
}
