// CPU kernel of dfptkd::normalize_images; kernels/normalize_images.py holds schema and semantics.
//
//   out[n, c, i, j] = float(raw[n, i', j', c]) * scale[c] + shift[c]
//
// raw is the zero-padded image and (i', j') the pixel that crop and flip put at (i, j). The output
// is channels_last, so a row of W pixels is 3 W floats in the order of the input's bytes: crop and
// flip move bytes of one row, and one vector loop converts them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChannels = 3;
constexpr int64_t kBlock = 48;                // 3 channels x 16 fp32 lanes: the pattern repeats
constexpr int64_t kBytesPerThread = 1 << 15;  // less is not worth waking a thread

struct Affine {
  float scale[kBlock];
  float shift[kBlock];
};

// out[k] = raw[k] * scale[k % 3] + shift[k % 3] for `count` bytes, which start at a red one.
DFPTKD_CLONES
void convert(const uint8_t* __restrict raw, float* __restrict out, int64_t count,
             const Affine& affine) {
  int64_t done = 0;
  for (; done + kBlock <= count; done += kBlock) {
    for (int64_t k = 0; k < kBlock; ++k) {
      out[done + k] = static_cast<float>(raw[done + k]) * affine.scale[k] + affine.shift[k];
    }
  }
  for (int64_t k = 0; done + k < count; ++k) {
    out[done + k] = static_cast<float>(raw[done + k]) * affine.scale[k] + affine.shift[k];
  }
}

struct Geometry {
  int64_t height, width, padding;
  const int64_t* offsets;  // [N, 2] (top, left), or null
  const bool* flip;        // [N], or null
};

// Bytes of output row `row` of one image: padded, cropped and flipped.
void gather_row(const uint8_t* image, int64_t index, int64_t row, const Geometry& g,
                uint8_t* out) {
  const int64_t top = g.offsets ? g.offsets[2 * index] - g.padding : 0;
  const int64_t left = g.offsets ? g.offsets[2 * index + 1] - g.padding : 0;
  const int64_t begin = std::clamp<int64_t>(-left, 0, g.width);  // first column inside the image
  const int64_t end = std::clamp<int64_t>(g.width - left, 0, g.width);
  const bool inside = row + top >= 0 && row + top < g.height && begin < end;
  const bool covered = inside && begin == 0 && end == g.width;
  if (!covered) {
    std::memset(out, 0, g.width * kChannels);
  }
  if (inside) {
    const uint8_t* source = image + ((row + top) * g.width + begin + left) * kChannels;
    std::memcpy(out + begin * kChannels, source, (end - begin) * kChannels);
  }
  if (g.flip && g.flip[index]) {
    for (int64_t a = 0, b = g.width - 1; a < b; ++a, --b) {
      std::swap_ranges(out + a * kChannels, out + (a + 1) * kChannels, out + b * kChannels);
    }
  }
}

void check_offsets(const int64_t* offsets, int64_t count, int64_t padding) {
  for (int64_t k = 0; k < count; ++k) {
    STD_TORCH_CHECK(offsets[k] >= 0 && offsets[k] <= 2 * padding,
                    "normalize_images: crop offset ", offsets[k], ": expected 0..", 2 * padding);
  }
}

Tensor normalize_images(const Tensor& images, const Tensor& scale, const Tensor& shift,
                        ScalarType dtype, int64_t padding, const std::optional<Tensor>& offsets,
                        const std::optional<Tensor>& flip) {
  // The Python side has checked the arguments; these keep a direct call of the operator in bounds.
  STD_TORCH_CHECK(dtype == ScalarType::Float, "normalize_images: the native kernel writes fp32");
  STD_TORCH_CHECK(images.dim() == 4 && images.size(3) == kChannels &&
                      images.scalar_type() == ScalarType::Byte,
                  "normalize_images: images must be uint8 [N, H, W, 3]");
  STD_TORCH_CHECK(scale.numel() == kChannels && shift.numel() == kChannels,
                  "normalize_images: scale and shift must have 3 values");
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2);
  STD_TORCH_CHECK(!offsets || offsets->numel() == 2 * count,
                  "normalize_images: offsets must be [N, 2]");
  STD_TORCH_CHECK(!flip || flip->numel() == count, "normalize_images: flip must be [N]");

  const Tensor raw = torch::stable::contiguous(images);
  const Tensor scales = torch::stable::contiguous(scale);
  const Tensor shifts = torch::stable::contiguous(shift);
  std::optional<Tensor> dense_offsets, dense_flip;  // own the memory that `geometry` points to
  Geometry geometry{height, width, padding, nullptr, nullptr};
  if (offsets) {
    dense_offsets = torch::stable::contiguous(*offsets);
    geometry.offsets = dense_offsets->const_data_ptr<int64_t>();
    check_offsets(geometry.offsets, 2 * count, padding);
  }
  if (flip) {
    dense_flip = torch::stable::contiguous(*flip);
    geometry.flip = dense_flip->const_data_ptr<bool>();
  }
  Affine affine;
  for (int64_t k = 0; k < kBlock; ++k) {
    affine.scale[k] = scales.const_data_ptr<float>()[k % kChannels];
    affine.shift[k] = shifts.const_data_ptr<float>()[k % kChannels];
  }

  Tensor out = dfptkd::empty_activation(count, kChannels, height, width);
  const uint8_t* bytes = raw.const_data_ptr<uint8_t>();
  float* values = out.mutable_data_ptr<float>();
  const int64_t row_bytes = width * kChannels;
  const int64_t rows_per_thread = kBytesPerThread / std::max<int64_t>(row_bytes, 1) + 1;
  torch::stable::parallel_for(0, count * height, rows_per_thread, [&](int64_t begin, int64_t end) {
    if (!geometry.offsets && !geometry.flip) {
      convert(bytes + begin * row_bytes, values + begin * row_bytes, (end - begin) * row_bytes,
              affine);
      return;
    }
    std::vector<uint8_t> row(row_bytes);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t index = r / height;
      gather_row(bytes + index * height * row_bytes, index, r % height, geometry, row.data());
      convert(row.data(), values + r * row_bytes, row_bytes, affine);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("normalize_images", TORCH_BOX(&normalize_images));
}
