// CPU kernel of dfptkd::frozen_conv3x3_native: fp32, activations [N, C, H, W] in channels_last,
// stride 1, one zero pixel around; schema and semantics are those of kernels/frozen_conv.py.
//
// Winograd's F(2x2, 3x3) makes 2 x 2 outputs of 4 x 4 inputs d and a 3 x 3 kernel g with 16
// products where the definition has 36:
//
//   y = A' [(G g G') * (B' d B)] A + bias           * by element, summed over channels
//
//        1  0 -1  0        1    0    0
//   B' = 0  1  1  0    G = 1/2  1/2  1/2    A' = 1  1  1  0
//        0 -1  1  0        1/2 -1/2  1/2         0  1 -1 -1
//        0  1  0 -1        0    0    1
//
// The sums over channels are 16 matrix products, [tiles, C] x [C, C_out], one for each element of a
// tile. A block of tiles stays in the second-level cache from the input to the output. Every tile
// is computed alone and in one order: neither threads nor the batch change a bit of it.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"
#include "vectors.h"

namespace {

using namespace dfptkd;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElements = 16;  // of a transformed tile, and of a transformed kernel
constexpr int64_t kLine = 16;      // floats of a cache line
constexpr int64_t kBlock = 32;     // tiles; 16 to 192 are within 5 % at 16 to 512 channels
constexpr int64_t kDepth = 128;    // channels that are summed up at a time
constexpr int64_t kLeast = 8;      // tiles of a block, whole register tiles of every machine
// Less is not worth waking a thread.
constexpr int64_t kMacsPerThread = 1 << 20;
constexpr int64_t kWeightsPerThread = 1 << 14;

// Element (k, c, i, j) of the kernels is data[k * out + c * in + i * row + j * col].
struct Kernels {
  const float* data;
  int64_t out, in, row, col;
};

struct Convolution {
  const float* x;
  float* y;
  Kernels kernels;
  int64_t height, width, channels, out_channels;
  int64_t tile_rows, tile_cols;     // of an image
  int64_t tiles, block;             // of all images, of a block
  std::vector<float> bias;          // [out_channels], in whole vectors
  std::vector<float> zeros;         // a pixel outside of the image
  std::unique_ptr<float[]> weight;  // panels of output channels: [kElements, channels, panel]

  // Where the outputs of a tile's row begin, in pixels; past the last tile, the end.
  int64_t pixels_before(int64_t tile) const {
    const int64_t line = tile / tile_cols;
    return (line / tile_rows * height + line % tile_rows * 2) * width;
  }
};

// How a block of tiles lies in memory: elements are planes [tiles, row], one cache line more apart
// than that, so that the same tile of all of them has room in the first-level cache.
struct Planes {
  Planes(int64_t tiles, int64_t row) : row(row), plane(tiles * row + kLine) {}
  int64_t floats() const { return kElements * plane + kSlack; }

  const int64_t row, plane;
};

// A whole vector, or the first `count` lanes and zeros.
template <class M, bool kWhole>
DFPTKD_INLINE void load(typename M::Vec& v, const float* p, int64_t count) {
  if constexpr (kWhole) {
    v = vector_at<M>(p);
  } else {
    float lanes[M::kLanes] = {};
    std::copy_n(p, count, lanes);
    v = vector_at<M>(lanes);
  }
}

// Weights -----------------------------------------------------------------------------------------

// to[0 ... 3] = G from[0 ... 2].
template <class Vec>
DFPTKD_INLINE void expand(const Vec (&from)[3], Vec (&to)[4]) {
  const Vec outer = 0.5f * (from[0] + from[2]), middle = 0.5f * from[1];
  to[0] = from[0];
  to[1] = outer + middle;
  to[2] = outer - middle;
  to[3] = from[2];
}

// G g G' of the kernels of one panel. In blocks of channels, so that the weights are read in whole
// cache lines, whichever of their dimensions is the inner one.
template <class M>
DFPTKD_INLINE void transform_kernels(const Convolution& f, int64_t panel) {
  using Vec = typename M::Vec;
  const Kernels& k = f.kernels;
  const int64_t first = panel * M::kPanel;
  const int64_t lanes = std::min<int64_t>(M::kPanel, f.out_channels - first);
  float* to = f.weight.get() + first * kElements * f.channels;
  float taps[9][kLine][M::kPanel] = {};
  for (int64_t begin = 0; begin < f.channels; begin += kLine) {
    const int64_t count = std::min(kLine, f.channels - begin);
    const float* from = k.data + first * k.out + begin * k.in;
    const auto copy = [&](int64_t c, int64_t lane) __attribute__((always_inline)) {
      unroll<9>(DFPTKD_EACH(t) {
        taps[t][c][lane] = from[lane * k.out + c * k.in + t / 3 * k.row + t % 3 * k.col];
      });
    };
    if (k.in < k.out) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t c = 0; c < count; ++c) {
          copy(c, lane);
        }
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          copy(c, lane);
        }
      }
    }
    for (int64_t at = 0; at < count * M::kPanel; at += M::kLanes, to += M::kLanes) {
      Vec rows[4][3];  // G g
      unroll<3>(DFPTKD_EACH(j) {
        Vec column[3], expanded[4];
        unroll<3>(DFPTKD_EACH(i) { column[i] = vector_at<M>(taps[3 * i + j][0] + at); });
        expand(column, expanded);
        unroll<4>(DFPTKD_EACH(i) { rows[i][j] = expanded[i]; });
      });
      unroll<4>(DFPTKD_EACH(i) {
        Vec expanded[4];
        expand(rows[i], expanded);
        unroll<4>(DFPTKD_EACH(j) {
          vector_at<M>(to + (4 * i + j) * f.channels * M::kPanel) = expanded[j];
        });
      });
    }
  }
}

// A block of tiles --------------------------------------------------------------------------------

// Neighboring tiles of one row: of image `image`, from tile (row, col) on.
struct Run {
  int64_t image, row, col, count;
};

// Calls part(run, its first tile in the block) for the tiles [first, last).
template <class Part>
DFPTKD_INLINE void for_runs(const Convolution& f, int64_t first, int64_t last, const Part& part) {
  for (int64_t tile = first; tile < last;) {
    const int64_t line = tile / f.tile_cols, col = tile % f.tile_cols;
    const Run run{line / f.tile_rows, line % f.tile_rows, col,
                  std::min(f.tile_cols - col, last - tile)};
    part(run, tile - first);
    tile += run.count;
  }
}

// B' of one column of a tile's pixels, from its four rows on.
template <class M, bool kWhole>
DFPTKD_INLINE void transform_column(const float* const (&lines)[4], int64_t count,
                                    typename M::Vec (&to)[4]) {
  typename M::Vec d[4];
  unroll<4>(DFPTKD_EACH(i) { load<M, kWhole>(d[i], lines[i], count); });
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// B' d B of a run of tiles, for the channels from `c` on: a whole vector of them, or `count`.
template <class M, bool kWhole>
DFPTKD_INLINE void transform_channels(const Convolution& f, const Run& run, int64_t c,
                                      int64_t count, const Planes& p, float* to) {
  const float* lines[4];  // in the first column that was not read yet
  int64_t steps[4];       // to the next column; a row outside of the image is one zero pixel
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t y = 2 * run.row - 1 + i;
    const bool is_inside = y >= 0 && y < f.height;
    steps[i] = is_inside ? f.channels : 0;
    const int64_t pixel = (run.image * f.height + y) * f.width + 2 * run.col;
    lines[i] = is_inside ? f.x + pixel * f.channels + c : f.zeros.data();
  }
  typename M::Vec d[4][4] = {};  // columns; a tile shares two with the next
  const auto read = [&](typename M::Vec (&column)[4]) __attribute__((always_inline)) {
    transform_column<M, kWhole>(lines, count, column);
    unroll<4>(DFPTKD_EACH(i) { lines[i] += steps[i]; });
  };
  const auto write = [&](float* tile) __attribute__((always_inline)) {
    unroll<4>(DFPTKD_EACH(i) {
      float* row = tile + 4 * i * p.plane;
      vector_at<M>(row) = d[0][i] - d[2][i];
      vector_at<M>(row + p.plane) = d[1][i] + d[2][i];
      vector_at<M>(row + 2 * p.plane) = d[2][i] - d[1][i];
      vector_at<M>(row + 3 * p.plane) = d[1][i] - d[3][i];
      d[0][i] = d[2][i];
      d[1][i] = d[3][i];
    });
  };
  if (run.col > 0) {
    unroll<4>(DFPTKD_EACH(i) { lines[i] -= steps[i]; });
    read(d[0]);
  }
  read(d[1]);
  // The last tile of a row reaches past the image by one column, or by two.
  const int64_t inside = std::min(run.count, (f.width - 1) / 2 - run.col);
  for (int64_t t = 0; t < inside; ++t, to += p.row) {
    read(d[2]);
    read(d[3]);
    write(to);
  }
  if (inside < run.count) {
    unroll<4>(DFPTKD_EACH(i) { d[2][i] = d[3][i] = typename M::Vec{}; });
    if (f.width % 2 == 0) {
      read(d[2]);
    }
    write(to);
  }
}

// B' d B of a run of tiles.
template <class M>
DFPTKD_INLINE void transform_tiles(const Convolution& f, const Run& run, const Planes& p,
                                   float* to) {
  int64_t c = 0;
  for (; c + M::kLanes <= f.channels; c += M::kLanes) {
    transform_channels<M, true>(f, run, c, M::kLanes, p, to + c);
  }
  if (c < f.channels) {
    transform_channels<M, false>(f, run, c, f.channels - c, p, to + c);
  }
}

// products = or += tiles[M::kRows, depth] @ weight[depth, kCols vectors].
template <class M, int kCols, bool kAdd>
DFPTKD_INLINE void multiply_part(const Matrix& tiles, const float* weight, int64_t depth,
                                 float* products, int64_t stride) {
  typename M::Vec sum[M::kRows][kCols];
  multiply_tile<M>(tiles, weight, M::kPanel, depth, sum);
  unroll<M::kRows>(DFPTKD_EACH(r) {
    unroll<kCols>(DFPTKD_EACH(c) {
      typename M::Vec& to = vector_at<M>(products + r * stride + c * M::kLanes);
      to = kAdd ? to + sum[r][c] : sum[r][c];
    });
  });
}

// The sums over channels, for kCols vectors of output channels; `rows` is a multiple of M::kRows.
// Sums of kDepth channels are added up: a long one would round more than oneDNN's.
template <class M, int kCols>
DFPTKD_INLINE void multiply(const Convolution& f, const float* tiles, const Planes& in,
                            int64_t rows, const float* panel, const Planes& out, float* products,
                            Ahead& ahead) {
  for (int64_t element = 0; element < kElements; ++element) {
    const float* weight = panel + element * f.channels * M::kPanel;
    for (int64_t row = 0; row < rows; row += M::kRows) {
      ahead.step();
      const float* from = tiles + element * in.plane + row * in.row;
      float* to = products + element * out.plane + row * out.row;
      multiply_part<M, kCols, false>({from, in.row, 1}, weight, std::min(kDepth, f.channels), to,
                                     out.row);
      for (int64_t c = kDepth; c < f.channels; c += kDepth) {
        multiply_part<M, kCols, true>({from + c, in.row, 1}, weight + c * M::kPanel,
                                      std::min(kDepth, f.channels - c), to, out.row);
      }
    }
  }
}

// A' m A + bias of a run of tiles, for one vector of output channels from `first` on.
template <class M>
DFPTKD_INLINE void finish_tiles(const Convolution& f, const Run& run, const Planes& p,
                                const float* products, int64_t first) {
  using Vec = typename M::Vec;
  const int64_t count = f.out_channels - first, y = 2 * run.row;
  const bool has_second = y + 1 < f.height;
  const Vec bias = vector_at<M>(f.bias.data() + first);
  float* top = f.y + (run.image * f.height + y) * f.width * f.out_channels + first;
  float* bottom = top + f.width * f.out_channels;
  for (int64_t t = 0; t < run.count; ++t, products += p.row) {
    Vec s[4][2];
    unroll<4>(DFPTKD_EACH(i) {
      const float* row = products + 4 * i * p.plane;
      const Vec m1 = vector_at<M>(row + p.plane), m2 = vector_at<M>(row + 2 * p.plane);
      s[i][0] = vector_at<M>(row) + (m1 + m2);
      s[i][1] = (m1 - m2) - vector_at<M>(row + 3 * p.plane);
    });
    const int64_t x = 2 * (run.col + t);
    unroll<2>(DFPTKD_EACH(j) {
      if (x + j < f.width) {
        const int64_t at = (x + j) * f.out_channels;
        store<M>(top + at, s[0][j] + (s[1][j] + s[2][j]) + bias, count);
        if (has_second) {
          store<M>(bottom + at, (s[1][j] - s[2][j]) - s[3][j] + bias, count);
        }
      }
    });
  }
}

// Blocks [begin, end) of tiles.
template <class M>
DFPTKD_INLINE void convolve_blocks(const Convolution& f, int64_t begin, int64_t end) {
  const Planes in(f.block, round_up(f.channels, M::kLanes)), out(f.block, M::kPanel);
  const int64_t panels = round_up(f.out_channels, M::kPanel) / M::kPanel;
  std::vector<float> tiles(in.floats()), products(out.floats());
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * f.block, last = std::min(first + f.block, f.tiles);
    for_runs(f, first, last, [&](const Run& run, int64_t tile) __attribute__((always_inline)) {
      transform_tiles<M>(f, run, in, tiles.data() + tile * in.row);
    });
    // Rows past the last tile hold what was there before; nobody reads their products.
    const int64_t rows = round_up(last - first, M::kRows);
    Ahead ahead(panels * kElements * (rows / M::kRows));
    const int64_t here = f.pixels_before(first), next = f.pixels_before(last);
    const int64_t after = f.pixels_before(std::min(last + f.block, f.tiles));
    ahead.add(f.x + next * f.channels, (after - next) * f.channels);
    ahead.add(f.y + here * f.out_channels, (next - here) * f.out_channels);  // before it is written
    for (int64_t column = 0; column < f.out_channels; column += M::kPanel) {
      const float* panel = f.weight.get() + column * kElements * f.channels;
      const bool is_wide = f.out_channels - column > M::kLanes;
      if (is_wide) {
        multiply<M, M::kCols>(f, tiles.data(), in, rows, panel, out, products.data(), ahead);
      } else {
        multiply<M, 1>(f, tiles.data(), in, rows, panel, out, products.data(), ahead);
      }
      for_runs(f, first, last, [&](const Run& run, int64_t tile) __attribute__((always_inline)) {
        const float* from = products.data() + tile * out.row;
        finish_tiles<M>(f, run, out, from, column);
        if (is_wide) {
          finish_tiles<M>(f, run, out, from + M::kLanes, column + M::kLanes);
        }
      });
    }
  }
}

// One copy of each walk for each machine ----------------------------------------------------------

struct Walks {
  void (*transform_kernels)(const Convolution&, int64_t panel);
  void (*convolve_blocks)(const Convolution&, int64_t begin, int64_t end);
  int64_t panel;  // output channels
};

#if defined(__x86_64__)
DFPTKD_AVX512 void transform_kernels_avx512(const Convolution& f, int64_t panel) {
  transform_kernels<Avx512>(f, panel);
}
DFPTKD_AVX2 void transform_kernels_avx2(const Convolution& f, int64_t panel) {
  transform_kernels<Avx2>(f, panel);
}
DFPTKD_AVX512 void convolve_avx512(const Convolution& f, int64_t begin, int64_t end) {
  convolve_blocks<Avx512>(f, begin, end);
}
DFPTKD_AVX2 void convolve_avx2(const Convolution& f, int64_t begin, int64_t end) {
  convolve_blocks<Avx2>(f, begin, end);
}
#endif
void transform_kernels_baseline(const Convolution& f, int64_t panel) {
  transform_kernels<Baseline>(f, panel);
}
void convolve_baseline(const Convolution& f, int64_t begin, int64_t end) {
  convolve_blocks<Baseline>(f, begin, end);
}

Walks choose_walks() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return {transform_kernels_avx512, convolve_avx512, Avx512::kPanel};
    case InstructionSet::kAvx2:
      return {transform_kernels_avx2, convolve_avx2, Avx2::kPanel};
    case InstructionSet::kBaseline:
      break;
  }
#endif
  return {transform_kernels_baseline, convolve_baseline, Baseline::kPanel};
}

const Walks kWalks = choose_walks();

// Tensors -----------------------------------------------------------------------------------------

Tensor frozen_conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      bool transposed) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      x.size(1) == weight.size(transposed ? 0 : 1),
                  "frozen_conv3x3: expected x [N, C, H, W] and weight [C_out, C, 3, 3]");
  const int64_t channels = x.size(1), out_channels = weight.size(transposed ? 1 : 0);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float &&
                      weight.scalar_type() == ScalarType::Float &&
                      (!bias || bias->scalar_type() == ScalarType::Float),
                  "frozen_conv3x3: the native kernel takes fp32");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out_channels),
                  "frozen_conv3x3: expected bias [", out_channels, "]");
  Tensor y = empty_activation(x.size(0), out_channels, x.size(2), x.size(3));
  if (x.numel() == 0 || out_channels == 0) {
    // Without channels in, every output is the bias; torch refuses such a weight, and so do we.
    STD_TORCH_CHECK(y.numel() == 0, "frozen_conv3x3: expected at least one channel");
    return y;
  }
  const Tensor pixels = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);

  Kernels kernels{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                  weight.stride(2), weight.stride(3)};
  if (transposed) {
    kernels = {kernels.data + 2 * (kernels.row + kernels.col), kernels.in, kernels.out,
               -kernels.row, -kernels.col};
  }
  const int64_t tile_rows = (x.size(2) + 1) / 2, tile_cols = (x.size(3) + 1) / 2;
  const int64_t tiles = x.size(0) * tile_rows * tile_cols;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = round_up(out_channels, kWalks.panel) / kWalks.panel;
  Convolution f{.x = pixels.const_data_ptr<float>(),
                .y = y.mutable_data_ptr<float>(),
                .kernels = kernels,
                .height = x.size(2),
                .width = x.size(3),
                .channels = channels,
                .out_channels = out_channels,
                .tile_rows = tile_rows,
                .tile_cols = tile_cols,
                .tiles = tiles,
                // A block for every thread, where there are few.
                .block = std::clamp(round_up(tiles / threads, kLeast), kLeast, kBlock),
                .bias = std::vector<float>(out_channels + kSlack),
                .zeros = std::vector<float>(channels + kSlack),
                // Left unset: it is large, and every element is written.
                .weight = std::make_unique_for_overwrite<float[]>(panels * kWalks.panel *
                                                                  kElements * channels)};
  if (bias) {
    const Tensor dense = torch::stable::contiguous(*bias);
    std::copy_n(dense.const_data_ptr<float>(), out_channels, f.bias.begin());
  }
  torch::stable::parallel_for(0, panels, kWeightsPerThread / (kWalks.panel * channels) + 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t panel = begin; panel < end; ++panel) {
                                  kWalks.transform_kernels(f, panel);
                                }
                              });
  torch::stable::parallel_for(
      0, (f.tiles + f.block - 1) / f.block,
      kMacsPerThread / (f.block * kElements * channels * out_channels) + 1,
      [&](int64_t begin, int64_t end) { kWalks.convolve_blocks(f, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("frozen_conv3x3_native", TORCH_BOX(&frozen_conv3x3));
}
