// CPU kernels of dfptkd::partial_pointwise_conv_native and its backward: fp32, activations
// [N, C, H, W] in channels_last. Equations and semantics are those of
// kernels/partial_pointwise_conv.py; here P is a pixel, [P, C] a matrix:
//
//   h = act(x * scale + shift) + residual          h[:, :c_p] = conv(h[:, :c_p])        y = h W^T
//   g = grad_y + grad_sums + 2 y grad_squared_sums,   dW = g^T h,   dh = g W
//   dh[:, :c_p] = conv(dh[:, :c_p], flipped),   dx = dh * (x * scale + shift > 0) * scale
//
// One walk over the pixels in tiles that stay in cache; where there is a convolution, over images.
// The convolved channels of an image are laid out as planes with a zero border: a plane is then one
// long row, and a tap one offset, for any image size. The middle activations are never stored: the
// backward makes them again. Sums run in fp32 over a tile and in fp64 over tiles, in an order that
// only the number of threads can change.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
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

constexpr int64_t kTile = 64;      // pixels whose activations stay in cache; their sums are fp32
constexpr int64_t kUnit = 512;     // pixels whose weight gradients are fp32, at least
constexpr int64_t kMacsPerThread = 1 << 18;  // less is not worth waking a thread

// Matrix product ----------------------------------------------------------------------------------

// Weights as panels of M::kPanel columns, zero-padded, each [depth, panel] in one piece of memory.
class Panels {
 public:
  // Element (k, n) of the weights is w.data[k * w.row + n * w.col].
  Panels(const Matrix& w, int64_t depth, int64_t columns, int64_t width)
      : depth(depth), columns(columns), width(width),
        data_(round_up(columns, width) * depth + kSlack) {
    const int64_t count = round_up(columns, width) / width;
    torch::stable::parallel_for(
        0, count, kMacsPerThread / kTile / (depth * width) + 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            fill_panel(w, i * width, std::min(width, columns - i * width));
          }
        });
  }
  const float* from(int64_t column) const { return data_.data() + column * depth; }

  const int64_t depth, columns, width;

 private:
  // In blocks of rows, so that a transposed matrix is read and written in whole cache lines.
  void fill_panel(const Matrix& w, int64_t column, int64_t count) {
    float* panel = data_.data() + column * depth;
    for (int64_t first = 0; first < depth; first += kMaxLanes) {
      const int64_t last = std::min(first + kMaxLanes, depth);
      for (int64_t n = 0; n < count; ++n) {
        const float* from = w.data + (column + n) * w.col;
        for (int64_t k = first; k < last; ++k) {
          panel[k * width + n] = from[k * w.row];
        }
      }
    }
  }

  std::vector<float> data_;
};

// Where a product goes: rows of `stride` floats, and sums over the rows of each column.
struct Product {
  float* data;
  int64_t stride;
  double* sums;  // null: not wanted
  double* squared_sums;
};

template <class M, int kRows, int kCols, bool kSums>
DFPTKD_INLINE void multiply_rows(const Matrix& a, const float* panel, const Panels& panels,
                                 float* out, int64_t stride, int64_t columns,
                                 typename M::Vec* sums, typename M::Vec* squared_sums) {
  typename M::Vec tile[kRows][kCols];
  multiply_tile<M>(a, panel, panels.width, panels.depth, tile);
  unroll<kCols>(DFPTKD_EACH(c) {
    typename M::Vec sum{}, squared_sum{};  // of these rows first: small sums round little
    unroll<kRows>(DFPTKD_EACH(r) {
      store<M>(out + r * stride + c * M::kLanes, tile[r][c], columns - c * M::kLanes);
      if constexpr (kSums) {
        sum += tile[r][c];
        squared_sum += tile[r][c] * tile[r][c];
      }
    });
    if constexpr (kSums) {
      sums[c] += sum;
      squared_sums[c] += squared_sum;
    }
  });
}

// to += the first `count` lanes of the vectors.
template <class M, int kCols>
DFPTKD_INLINE void add_to(const typename M::Vec (&from)[kCols], int64_t count, double* to) {
  float lanes[kCols * M::kLanes];
  unroll<kCols>(DFPTKD_EACH(c) { vector_at<M>(lanes + c * M::kLanes) = from[c]; });
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) {
    to[n] += lanes[n];
  }
}

template <class M, int kCols, bool kSums>
DFPTKD_INLINE void multiply_panel(const Matrix& a, int64_t rows, const Panels& panels,
                                  int64_t column, const Product& out, Ahead& ahead) {
  const float* panel = panels.from(column);
  const int64_t columns = std::min<int64_t>(panels.columns - column, kCols * M::kLanes);
  typename M::Vec sums[kCols] = {}, squared_sums[kCols] = {};
  int64_t row = 0;
  for (; row + M::kRows <= rows; row += M::kRows) {
    ahead.step();
    multiply_rows<M, M::kRows, kCols, kSums>(
        {a.data + row * a.row, a.row, a.col}, panel, panels,
        out.data + row * out.stride + column, out.stride, columns, sums, squared_sums);
  }
  for (; row < rows; ++row) {
    multiply_rows<M, 1, kCols, kSums>(
        {a.data + row * a.row, a.row, a.col}, panel, panels,
        out.data + row * out.stride + column, out.stride, columns, sums, squared_sums);
  }
  if constexpr (kSums) {
    add_to<M>(sums, columns, out.sums + column);
    add_to<M>(squared_sums, columns, out.squared_sums + column);
  }
}

// out = a[rows, depth] @ panels.
template <class M, bool kSums>
DFPTKD_INLINE void multiply(const Matrix& a, int64_t rows, const Panels& panels,
                            const Product& out, Ahead& ahead) {
  int64_t column = 0;
  for (; panels.columns - column > M::kLanes; column += M::kPanel) {
    multiply_panel<M, M::kCols, kSums>(a, rows, panels, column, out, ahead);
  }
  if (column < panels.columns) {
    multiply_panel<M, 1, kSums>(a, rows, panels, column, out, ahead);
  }
}

template <class M, int kRows, int kCols>
DFPTKD_INLINE void accumulate_rows(const Matrix& a, const float* b, int64_t b_row, int64_t depth,
                                   float* out, int64_t out_row) {
  typename M::Vec tile[kRows][kCols];
  multiply_tile<M>(a, b, b_row, depth, tile);
  unroll<kRows>(DFPTKD_EACH(r) {
    unroll<kCols>(DFPTKD_EACH(c) {
      vector_at<M>(out + r * out_row + c * M::kLanes) += tile[r][c];
    });
  });
}

template <class M, int kCols>
DFPTKD_INLINE void accumulate_panel(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                                    int64_t depth, float* out, int64_t out_row, Ahead& ahead) {
  int64_t row = 0;
  for (; row + M::kRows <= rows; row += M::kRows) {
    ahead.step();
    accumulate_rows<M, M::kRows, kCols>({a.data + row * a.row, a.row, a.col}, b, b_row, depth,
                                        out + row * out_row, out_row);
  }
  for (; row < rows; ++row) {
    accumulate_rows<M, 1, kCols>({a.data + row * a.row, a.row, a.col}, b, b_row, depth,
                                 out + row * out_row, out_row);
  }
}

// out[rows, columns] += a[rows, depth] @ b[depth, columns] in whole vectors: what stands past the
// columns of b is read, what stands past those of out is written.
template <class M>
DFPTKD_INLINE void accumulate(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                              int64_t depth, int64_t columns, float* out, int64_t out_row,
                              Ahead& ahead) {
  int64_t column = 0;
  for (; columns - column > M::kLanes; column += M::kPanel) {
    accumulate_panel<M, M::kCols>(a, rows, b + column, b_row, depth, out + column, out_row, ahead);
  }
  if (column < columns) {
    accumulate_panel<M, 1>(a, rows, b + column, b_row, depth, out + column, out_row, ahead);
  }
}

// Convolution of planes ---------------------------------------------------------------------------

// Geometry of zero-bordered planes, each of several images one below the other.
struct Planes {
  Planes(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
         int64_t widest)
      : height(height), width(width), channels(channels), kernel(kernel), border(kernel / 2),
        row(width + 2 * border), image(row * (height + 2 * border) + kMaxLanes),
        size(images * image + kSlack) {
    place_vectors(images, widest);
  }

  // First pixel of image i proper in plane c.
  int64_t origin(int64_t c, int64_t i = 0) const {
    return c * size + i * image + border * row + border;
  }
  // How many of `vectors` serve the first images.
  int64_t vectors_of(int64_t images) const { return images * vectors_per_image; }

  const int64_t height, width, channels, kernel;
  const int64_t border;
  const int64_t row;    // floats from one line of pixels to the next
  const int64_t image;  // floats of an image, borders and zeros for a last vector included
  const int64_t size;   // floats of a plane, slack included

  int64_t lanes = 0;             // of the vectors
  std::vector<int64_t> vectors;  // offsets that together reach every pixel once
  int64_t vectors_per_image = 0;

 private:
  // Vectors reach past the pixels, on borders or the next line's border: line by line, or over the
  // image as one long row, whichever reaches less in vain.
  void place_vectors(int64_t images, int64_t widest) {
    int64_t fewest = std::numeric_limits<int64_t>::max(), line = 0;
    for (const int64_t candidate : {widest, std::min<int64_t>(widest, kNarrow)}) {
      const int64_t of_line = round_up(width, candidate);
      const int64_t of_image = round_up(row * (height - 1) + width, candidate);
      if (of_line <= row && height * of_line < fewest) {
        fewest = height * of_line, lanes = candidate, line = of_line;
      }
      if (of_image < fewest) {
        fewest = of_image, lanes = candidate, line = 0;
      }
    }
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t at = 0; at < fewest; at += lanes) {
        vectors.push_back(i * image + (line == 0 ? at : at / line * row + at % line));
      }
    }
    vectors_per_image = fewest / lanes;
  }
};

// to[j * to_row + i] = from[i * from_row + j] for i < rows, j < cols.
DFPTKD_INLINE void transpose(const float* from, int64_t from_row, int64_t rows, int64_t cols,
                             float* to, int64_t to_row) {
  using Four = Machine<4, 1, 1, 1>;  // blocks of 4 x 4 are transposed in registers
  int64_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      Four::Vec block[4];
      unroll<4>(DFPTKD_EACH(k) { block[k] = vector_at<Four>(from + (i + k) * from_row + j); });
      unroll<4>(DFPTKD_EACH(k) {
        vector_at<Four>(to + (j + k) * to_row + i) =
            Four::Vec{block[0][k()], block[1][k()], block[2][k()], block[3][k()]};
      });
    }
    for (; i < rows; ++i) {
      unroll<4>(DFPTKD_EACH(k) { to[(j + k) * to_row + i] = from[i * from_row + j + k]; });
    }
  }
  for (; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      to[j * to_row + i] = from[i * from_row + j];
    }
  }
}

// The first channels of images [pixels, stride] into planes, whose borders are zero already.
DFPTKD_INLINE void to_planes(const float* pixels, int64_t stride, int64_t images, const Planes& p,
                             float* planes) {
  for (int64_t y = 0; y < images * p.height; ++y) {
    transpose(pixels + y * p.width * stride, stride, p.width, p.channels,
              planes + p.origin(0, y / p.height) + y % p.height * p.row, p.size);
  }
}

// And back; `planes` starts at the first pixel of plane 0.
DFPTKD_INLINE void from_planes(const float* planes, int64_t images, const Planes& p, float* pixels,
                               int64_t stride) {
  for (int64_t y = 0; y < images * p.height; ++y) {
    transpose(planes + y / p.height * p.image + y % p.height * p.row, p.size, p.channels, p.width,
              pixels + y * p.width * stride, stride);
  }
}

// kOut output planes from `first` on, at kCols vectors.
template <class M, int kOut, int kCols>
DFPTKD_INLINE void convolve_tile(const float* in, const float* weight, const Planes& p,
                                 int64_t first, const int64_t* at, float* out) {
  typename M::Vec sum[kOut][kCols] = {};
  for (int64_t line = 0; line < p.channels * p.kernel; ++line) {
    const float* lines = in + line / p.kernel * p.size + line % p.kernel * p.row;
    const float* taps = weight + line * p.kernel * p.channels + first;
    for (int64_t dx = 0; dx < p.kernel; ++dx, taps += p.channels) {
      typename M::Vec pixels[kCols];
      unroll<kCols>(DFPTKD_EACH(v) { pixels[v] = vector_at<M>(lines + dx + at[v]); });
      unroll<kOut>(DFPTKD_EACH(o) {
        unroll<kCols>(DFPTKD_EACH(v) { sum[o][v] += taps[o] * pixels[v]; });
      });
    }
  }
  unroll<kOut>(DFPTKD_EACH(o) {
    unroll<kCols>(DFPTKD_EACH(v) {
      vector_at<M>(out + (first + o) * p.size + at[v]) = sum[o][v];
    });
  });
}

template <class M, int kOut>
DFPTKD_INLINE void convolve_planes(const float* in, const float* weight, const Planes& p,
                                   int64_t count, int64_t first, float* out) {
  const int64_t* at = p.vectors.data();
  for (; count >= M::kSpan; count -= M::kSpan, at += M::kSpan) {
    convolve_tile<M, kOut, M::kSpan>(in, weight, p, first, at, out);
  }
  for (; count > 0; --count, ++at) {
    convolve_tile<M, kOut, 1>(in, weight, p, first, at, out);
  }
}

template <class M>
DFPTKD_INLINE void convolve_vectors(const float* in, const float* weight, const Planes& p,
                                    int64_t count, float* out) {
  int64_t first = 0;
  for (; first + 4 <= p.channels; first += 4) {
    convolve_planes<M, 4>(in, weight, p, count, first, out);
  }
  for (; first + 2 <= p.channels; first += 2) {
    convolve_planes<M, 2>(in, weight, p, count, first, out);
  }
  for (; first < p.channels; ++first) {
    convolve_planes<M, 1>(in, weight, p, count, first, out);
  }
}

// out[o](y, x) = sum over c, dy, dx of weight[c][dy][dx][o] * in[c](y + dy, x + dx); out starts at
// the first pixel of plane 0 and holds anything between the lines of the images.
template <class M>
DFPTKD_INLINE void convolve(const float* in, const float* weight, const Planes& p, int64_t images,
                            float* out) {
  if (p.lanes == M::kLanes) {
    convolve_vectors<M>(in, weight, p, p.vectors_of(images), out);
  } else {
    convolve_vectors<typename M::Narrow>(in, weight, p, p.vectors_of(images), out);
  }
}

template <class M>
DFPTKD_INLINE float sum_of(const typename M::Vec& v) {
  if constexpr (M::kLanes == 1) {
    return v[0];
  } else {
    using Half = typename M::template With<M::kLanes / 2>;
    const auto* lanes = reinterpret_cast<const float*>(&v);
    return sum_of<Half>(vector_at<Half>(lanes) + vector_at<Half>(lanes + Half::kLanes));
  }
}

// kTaps neighboring taps of one line of the kernel, for kOut output planes.
template <class M, int kOut, int kTaps>
DFPTKD_INLINE void correlate_tile(const float* in, const float* grad, const Planes& p,
                                  int64_t count, double* weight_grad) {
  typename M::Vec sum[kOut][kTaps] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = p.vectors[i];
    unroll<kTaps>(DFPTKD_EACH(t) {
      const typename M::Vec pixels = vector_at<M>(in + t + at);
      unroll<kOut>(DFPTKD_EACH(o) {
        sum[o][t] += vector_at<M>(grad + o * p.size + at) * pixels;
      });
    });
  }
  unroll<kTaps>(DFPTKD_EACH(t) {
    unroll<kOut>(DFPTKD_EACH(o) {
      weight_grad[t * p.channels + o] += sum_of<M>(sum[o][t]);
    });
  });
}

template <class M, int kOut>
DFPTKD_INLINE void correlate_planes(const float* in, const float* grad, const Planes& p,
                                    int64_t count, int64_t first, double* weight_grad) {
  const float* lines = grad + p.origin(first);
  for (int64_t line = 0; line < p.channels * p.kernel; ++line) {
    const float* pixels = in + line / p.kernel * p.size + line % p.kernel * p.row;
    double* taps = weight_grad + line * p.kernel * p.channels + first;
    int64_t dx = 0;
    for (; dx + 4 <= p.kernel; dx += 4) {
      correlate_tile<M, kOut, 4>(pixels + dx, lines, p, count, taps + dx * p.channels);
    }
    if (dx + 3 == p.kernel) {
      correlate_tile<M, kOut, 3>(pixels + dx, lines, p, count, taps + dx * p.channels);
    } else {
      correlate_tile<M, kOut, 1>(pixels + dx, lines, p, count, taps + dx * p.channels);
    }
  }
}

template <class M>
DFPTKD_INLINE void correlate_vectors(const float* in, const float* grad, const Planes& p,
                                     int64_t count, double* weight_grad) {
  int64_t first = 0;
  for (; first + M::kOut <= p.channels; first += M::kOut) {
    correlate_planes<M, M::kOut>(in, grad, p, count, first, weight_grad);
  }
  for (; first < p.channels; ++first) {
    correlate_planes<M, 1>(in, grad, p, count, first, weight_grad);
  }
}

// weight_grad[c][dy][dx][o] += sum over images, y, x of in[c](y + dy, x + dx) * grad[o](y, x). The
// borders of `grad` are zero: what vectors reach past the pixels adds nothing.
template <class M>
DFPTKD_INLINE void correlate(const float* in, const float* grad, const Planes& p, int64_t images,
                             double* weight_grad) {
  if (p.lanes == M::kLanes) {
    correlate_vectors<M>(in, grad, p, p.vectors_of(images), weight_grad);
  } else {
    correlate_vectors<typename M::Narrow>(in, grad, p, p.vectors_of(images), weight_grad);
  }
}

// The operator ------------------------------------------------------------------------------------

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What forward and backward share: the input [pixels, channels] and how it becomes h.
struct Input {
  int64_t pixels, channels, out_channels, groups;
  int64_t unit;  // pixels that are walked over at a time: whole images where there is a convolution
  const float* x;
  const float* residual;  // or null
  std::vector<float> scale, shift;
  float floor;       // 0 with ReLU, else -inf
  bool is_identity;  // h, before the convolution, is x itself
  Planes planes;
  bool has_conv;
  std::vector<float> conv_weight;  // [c][dy][dx][o]

  int64_t depth() const { return channels / groups; }
  int64_t width() const { return out_channels / groups; }
  int64_t units() const { return (pixels + unit - 1) / unit; }
  int64_t images(int64_t count) const { return count / (planes.height * planes.width); }

  // Asks for the values that the walk reads after those of `tile`: of the next tile, or of the same
  // tile of the next images.
  void ask_for(const float* values, int64_t stride, int64_t tile, Ahead& ahead) const {
    const int64_t next = tile + (has_conv ? unit : kTile);
    if (values != nullptr && next < pixels) {
      ahead.add(values + next * stride, std::min(kTile, pixels - next) * stride);
    }
  }
};

// Buffers of one thread.
struct Scratch {
  explicit Scratch(const Input& in)
      : hidden((in.has_conv ? in.unit : kTile) * in.channels + kSlack),
        planes(in.has_conv ? in.planes.channels * in.planes.size : 0),
        convolved(in.has_conv ? in.planes.channels * in.planes.size : 0) {}

  std::vector<float> hidden, planes, convolved;
};

// h of `rows` pixels from `first` on.
DFPTKD_INLINE void activate(const Input& in, int64_t first, int64_t rows, float* hidden) {
  const int64_t channels = in.channels;
  const float* __restrict scale = in.scale.data();
  const float* __restrict shift = in.shift.data();
  const float floor = in.floor;
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict x = in.x + (first + r) * channels;
    float* __restrict h = hidden + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float a = x[c] * scale[c] + shift[c];
      h[c] = a < floor ? floor : a;  // keeps NaN
    }
    if (in.residual != nullptr) {
      const float* __restrict residual = in.residual + (first + r) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        h[c] += residual[c];
      }
    }
  }
}

// h of `count` pixels, whole images, with its first channels convolved; s.planes keeps those as
// they were.
template <class M>
DFPTKD_INLINE void activate_images(const Input& in, int64_t first, int64_t count, Scratch& s) {
  const int64_t images = in.images(count);
  activate(in, first, count, s.hidden.data());
  to_planes(s.hidden.data(), in.channels, images, in.planes, s.planes.data());
  convolve<M>(s.planes.data(), in.conv_weight.data(), in.planes, images, s.convolved.data());
  from_planes(s.convolved.data(), images, in.planes, s.hidden.data(), in.channels);
}

// h, convolved, of a tile inside the unit that starts at `first`.
DFPTKD_INLINE const float* hidden_tile(const Input& in, int64_t first, int64_t tile, int64_t rows,
                                       Scratch& s) {
  if (in.has_conv) {
    return s.hidden.data() + (tile - first) * in.channels;
  }
  if (in.is_identity && in.depth() % kMaxLanes == 0) {  // its rows are read in whole vectors
    return in.x + tile * in.channels;
  }
  activate(in, tile, rows, s.hidden.data());
  return s.hidden.data();
}

struct Forward {
  Input in;
  std::vector<Panels> weight;  // a group each: [depth, width]
  float* y;
};

// Units [begin, end); sums [2, out_channels] are added to.
template <class M>
DFPTKD_INLINE void forward_units(const Forward& f, int64_t begin, int64_t end, double* sums) {
  const Input& in = f.in;
  const int64_t panels = round_up(in.width(), M::kPanel) / M::kPanel;
  Scratch s(in);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t first = u * in.unit, last = std::min(first + in.unit, in.pixels);
    if (in.has_conv) {
      activate_images<M>(in, first, last - first, s);
    }
    for (int64_t tile = first; tile < last; tile += kTile) {
      const int64_t rows = std::min(kTile, last - tile);
      const float* hidden = hidden_tile(in, first, tile, rows, s);
      Ahead ahead(in.groups * panels * (kTile / M::kRows));
      if (!in.is_identity) {  // a product that reads x itself asks for it well enough
        in.ask_for(in.x, in.channels, tile, ahead);
        in.ask_for(in.residual, in.channels, tile, ahead);
      }
      for (int64_t g = 0; g < in.groups; ++g) {
        double* group_sums = sums + g * in.width();
        multiply<M, true>({hidden + g * in.depth(), in.channels, 1}, rows, f.weight[g],
                          {f.y + tile * in.out_channels + g * in.width(), in.out_channels,
                           group_sums, group_sums + in.out_channels},
                          ahead);
      }
    }
  }
}

struct Backward {
  Input in;
  std::vector<Panels> weight;       // a group each, transposed: [width, depth]
  std::vector<float> flipped_conv;  // of the transposed convolution, [o][dy][dx][c]
  const float* grad_y;
  const float* y;
  std::vector<float> grad_sums, double_grad_squared_sums;  // [out_channels]; empty: absent
  float* grad_x;         // or null
  float* grad_residual;  // or null
  bool needs_weights;

  bool needs_hidden() const { return grad_x != nullptr || grad_residual != nullptr; }
  // Where dh of a tile is made: in the gradient that it is itself, where there is one.
  float* place_of_hidden(int64_t tile, float* buffer) const {
    float* place = grad_residual != nullptr ? grad_residual : in.is_identity ? grad_x : nullptr;
    return place != nullptr ? place + tile * in.channels : buffer;
  }
  int64_t weight_row() const { return round_up(in.depth(), 2 * kMaxLanes); }
};

// What the threads add up, each its own.
struct Gradients {
  explicit Gradients(const Backward& b)
      : scale(b.in.channels), shift(b.in.channels),
        point_weight(b.needs_weights ? b.in.out_channels * b.weight_row() : 0),
        conv_weight(b.needs_weights ? b.in.conv_weight.size() : 0) {}

  void add(const Gradients& other) {
    const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
      std::transform(to.begin(), to.end(), from.begin(), to.begin(), std::plus<>());
    };
    add(scale, other.scale);
    add(shift, other.shift);
    add(point_weight, other.point_weight);
    add(conv_weight, other.conv_weight);
  }

  std::vector<double> scale, shift;
  std::vector<double> point_weight;  // [out_channels, weight_row]
  std::vector<double> conv_weight;   // [c][dy][dx][o]
};

// g of `rows` pixels from `first` on: grad_y itself where nothing is added.
DFPTKD_INLINE const float* upstream_tile(const Backward& b, int64_t first, int64_t rows,
                                         float* buffer) {
  const int64_t channels = b.in.out_channels;
  if (b.grad_sums.empty()) {
    return b.grad_y + first * channels;
  }
  const float* __restrict sums = b.grad_sums.data();
  const float* __restrict squares = b.double_grad_squared_sums.data();
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict grad = b.grad_y + (first + r) * channels;
    const float* __restrict y = b.y + (first + r) * channels;
    float* __restrict out = buffer + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = grad[c] + sums[c] + squares[c] * y[c];
    }
  }
  return buffer;
}

// From dh of `rows` pixels to the gradients of x, scale and shift; one vector of channels from
// `channel` on.
template <class M>
DFPTKD_INLINE void finish_channels(const Backward& b, int64_t first, int64_t rows, int64_t channel,
                                   const float* dh, Gradients& gradients) {
  using Vec = typename M::Vec;
  const int64_t stride = b.in.channels;
  const Vec scale = vector_at<M>(b.in.scale.data() + channel);
  const Vec shift = vector_at<M>(b.in.shift.data() + channel);
  const Vec floor = Vec{} + b.in.floor;
  const float* x = b.in.x + first * stride + channel;
  float* grad_x = b.grad_x + first * stride + channel;
  Vec d_scale[1] = {}, d_shift[1] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Vec value = vector_at<M>(x + r * stride);
    const Vec grad = vector_at<M>(dh + r * stride + channel);
    const Vec da = value * scale + shift <= floor ? Vec{} : grad;
    d_scale[0] += da * value;
    d_shift[0] += da;
    vector_at<M>(grad_x + r * stride) = da * scale;
  }
  add_to<M>(d_scale, M::kLanes, gradients.scale.data() + channel);
  add_to<M>(d_shift, M::kLanes, gradients.shift.data() + channel);
}

// The channels from `channel` on: by whole vectors, and ever smaller ones for the rest.
template <class M>
DFPTKD_INLINE void finish_from(const Backward& b, int64_t first, int64_t rows, int64_t channel,
                               const float* dh, Gradients& gradients) {
  for (; channel + M::kLanes <= b.in.channels; channel += M::kLanes) {
    finish_channels<M>(b, first, rows, channel, dh, gradients);
  }
  if constexpr (M::kLanes > 1) {
    finish_from<typename M::template With<M::kLanes / 2>>(b, first, rows, channel, dh, gradients);
  }
}

template <class M>
DFPTKD_INLINE void finish_tile(const Backward& b, int64_t first, int64_t rows, const float* dh,
                               Gradients& gradients) {
  const int64_t channels = b.in.channels;
  if (b.grad_residual != nullptr && dh != b.grad_residual + first * channels) {
    std::copy_n(dh, rows * channels, b.grad_residual + first * channels);
  }
  if (b.grad_x == nullptr || dh == b.grad_x + first * channels) {
    return;
  }
  finish_from<M>(b, first, rows, 0, dh, gradients);
}

// Units [begin, end).
template <class M>
DFPTKD_INLINE void backward_units(const Backward& b, int64_t begin, int64_t end,
                                  Gradients& gradients) {
  const Input& in = b.in;
  const int64_t width = in.width(), depth = in.depth(), row = b.weight_row();
  const int64_t panels = round_up(depth, M::kPanel) / M::kPanel;
  const int64_t steps =
      in.groups * panels * ((b.needs_weights ? width : 0) + kTile) / M::kRows;
  Scratch s(in);
  std::vector<float> upstream(kTile * in.out_channels);
  std::vector<float> dh((in.has_conv ? in.unit : kTile) * in.channels);
  std::vector<float> grad_planes(s.planes.size()), point_weight(gradients.point_weight.size());
  for (int64_t u = begin; u < end; ++u) {
    const int64_t first = u * in.unit, last = std::min(first + in.unit, in.pixels);
    if (in.has_conv && b.needs_weights) {
      activate_images<M>(in, first, last - first, s);
    }
    for (int64_t tile = first; tile < last; tile += kTile) {
      const int64_t rows = std::min(kTile, last - tile);
      const float* g = upstream_tile(b, tile, rows, upstream.data());
      Ahead ahead(steps);
      in.ask_for(b.grad_y, in.out_channels, tile, ahead);
      in.ask_for(b.grad_sums.empty() ? nullptr : b.y, in.out_channels, tile, ahead);
      in.ask_for(in.x, in.channels, tile, ahead);
      in.ask_for(in.residual, in.channels, tile, ahead);
      if (b.needs_weights) {
        const float* hidden = hidden_tile(in, first, tile, rows, s);
        for (int64_t i = 0; i < in.groups; ++i) {
          accumulate<M>({g + i * width, 1, in.out_channels}, width, hidden + i * depth,
                        in.channels, rows, depth, point_weight.data() + i * width * row, row,
                        ahead);
        }
      }
      if (b.needs_hidden() || in.has_conv) {
        float* dh_tile = in.has_conv ? dh.data() + (tile - first) * in.channels
                                     : b.place_of_hidden(tile, dh.data());
        for (int64_t i = 0; i < in.groups; ++i) {
          multiply<M, false>({g + i * width, in.out_channels, 1}, rows, b.weight[i],
                             {dh_tile + i * depth, in.channels, nullptr, nullptr}, ahead);
        }
        if (!in.has_conv) {
          finish_tile<M>(b, tile, rows, dh_tile, gradients);
        }
      }
    }
    if (in.has_conv) {
      const int64_t images = in.images(last - first);
      to_planes(dh.data(), in.channels, images, in.planes, grad_planes.data());
      if (b.needs_weights) {
        correlate<M>(s.planes.data(), grad_planes.data(), in.planes, images,
                     gradients.conv_weight.data());
      }
      if (b.needs_hidden()) {
        convolve<M>(grad_planes.data(), b.flipped_conv.data(), in.planes, images,
                    s.convolved.data());
        from_planes(s.convolved.data(), images, in.planes, dh.data(), in.channels);
        for (int64_t tile = first; tile < last; tile += kTile) {
          finish_tile<M>(b, tile, std::min(kTile, last - tile),
                         dh.data() + (tile - first) * in.channels, gradients);
        }
      }
    }
    for (size_t i = 0; i < point_weight.size(); ++i) {
      gradients.point_weight[i] += point_weight[i];
      point_weight[i] = 0;
    }
  }
}

// One copy of each walk for each machine ----------------------------------------------------------

#if defined(__x86_64__)
DFPTKD_AVX512 void forward_avx512(const Forward& f, int64_t begin, int64_t end, double* sums) {
  forward_units<Avx512>(f, begin, end, sums);
}
DFPTKD_AVX2 void forward_avx2(const Forward& f, int64_t begin, int64_t end, double* sums) {
  forward_units<Avx2>(f, begin, end, sums);
}
DFPTKD_AVX512 void backward_avx512(const Backward& b, int64_t begin, int64_t end, Gradients& sum) {
  backward_units<Avx512>(b, begin, end, sum);
}
DFPTKD_AVX2 void backward_avx2(const Backward& b, int64_t begin, int64_t end, Gradients& sum) {
  backward_units<Avx2>(b, begin, end, sum);
}
#endif
void forward_baseline(const Forward& f, int64_t begin, int64_t end, double* sums) {
  forward_units<Baseline>(f, begin, end, sums);
}
void backward_baseline(const Backward& b, int64_t begin, int64_t end, Gradients& sum) {
  backward_units<Baseline>(b, begin, end, sum);
}

struct Walks {
  void (*forward)(const Forward&, int64_t, int64_t, double*);
  void (*backward)(const Backward&, int64_t, int64_t, Gradients&);
  int64_t lanes;
  int64_t panel;  // columns of the weights' panels
};

Walks choose_walks() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return {forward_avx512, backward_avx512, Avx512::kLanes, Avx512::kPanel};
    case InstructionSet::kAvx2:
      return {forward_avx2, backward_avx2, Avx2::kLanes, Avx2::kPanel};
    case InstructionSet::kBaseline:
      break;
  }
#endif
  return {forward_baseline, backward_baseline, Baseline::kLanes, Baseline::kPanel};
}

const Walks kWalks = choose_walks();

// Tensors -----------------------------------------------------------------------------------------

// fp32 tensors as pointers; holds what had to be copied.
class Values {
 public:
  const float* of(const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                    "the native partial_pointwise_conv takes fp32");
    held_.push_back(torch::stable::contiguous(tensor, format));
    return held_.back().const_data_ptr<float>();
  }
  const float* pixels_of(const Tensor& activation) {
    return of(activation, MemoryFormat::ChannelsLast);
  }
  std::vector<float> copy(const std::optional<Tensor>& tensor, int64_t count, float absent) {
    if (!tensor) {
      return std::vector<float>(count, absent);
    }
    STD_TORCH_CHECK(tensor->numel() == count, "expected ", count, " channels");
    const float* values = of(*tensor);
    return {values, values + count};
  }

 private:
  std::vector<Tensor> held_;
};

// [c][dy][dx][o] of a weight [out, in, k, k]; `flipped`: of the transposed convolution.
std::vector<float> tap_order(const float* weight, int64_t channels, int64_t kernel, bool flipped) {
  const int64_t area = kernel * kernel;
  std::vector<float> taps(channels * channels * area);
  for (int64_t o = 0; o < channels; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < area; ++t) {
        const float value = weight[(o * channels + c) * area + t];
        if (flipped) {
          taps[(o * area + area - 1 - t) * channels + c] = value;
        } else {
          taps[(c * area + t) * channels + o] = value;
        }
      }
    }
  }
  return taps;
}

// The Python side has checked the arguments; these keep a direct call of an operator in bounds.
Input make_input(Values& values, const Tensor& x, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& partial_weight,
                 const Tensor& point_weight, const std::optional<Tensor>& residual, bool relu,
                 int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && point_weight.dim() == 2,
                  "expected x [N, C, H, W] and point_weight [C_out, C / groups]");
  const int64_t channels = x.size(1), out_channels = point_weight.size(0);
  STD_TORCH_CHECK(groups > 0 && point_weight.size(1) * groups == channels &&
                      out_channels % groups == 0,
                  "point_weight: expected [C_out, C / groups]");
  STD_TORCH_CHECK(!residual || residual->numel() == x.numel(), "residual: expected x's shape");
  const bool has_conv = partial_weight.has_value();
  const int64_t touched = has_conv ? partial_weight->size(0) : 0;
  const int64_t kernel = has_conv ? partial_weight->size(2) : 1;
  STD_TORCH_CHECK(!has_conv || (partial_weight->numel() == touched * touched * kernel * kernel &&
                                touched <= channels && kernel % 2 == 1),
                  "partial_weight: expected [c_p, c_p, k, k] with odd k");
  const int64_t image = std::max<int64_t>(x.size(2) * x.size(3), 1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pixels = x.size(0) * image;
  // No more than a thread's share.
  const int64_t unit = std::clamp<int64_t>(round_up(pixels / threads, kTile), kTile, kUnit);
  const int64_t images = has_conv ? (unit + image - 1) / image : 1;
  Input in{.pixels = pixels,
           .channels = channels,
           .out_channels = out_channels,
           .groups = groups,
           .unit = has_conv ? images * image : unit,
           .x = values.pixels_of(x),
           .residual = residual ? values.pixels_of(*residual) : nullptr,
           .scale = values.copy(scale, channels, 1),
           .shift = values.copy(shift, channels, 0),
           .floor = relu ? 0 : -kInfinity,
           .is_identity = !scale && !shift && !relu && !residual,
           .planes = Planes(images, x.size(2), x.size(3), touched, kernel, kWalks.lanes),
           .has_conv = has_conv,
           .conv_weight = {}};
  if (has_conv) {
    in.conv_weight = tap_order(values.of(*partial_weight), touched, kernel, false);
  }
  return in;
}

// Calls walk(chunk, begin, end) on `chunks` ranges of units that cover all, in parallel.
template <class Walk>
void over_units(const Input& in, int64_t chunks, Walk walk) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      walk(i, in.units() * i / chunks, in.units() * (i + 1) / chunks);
    }
  });
}

// As many as are worth a thread.
int64_t chunks_of(const Input& in) {
  const int64_t macs = in.pixels * in.channels * in.width();
  return std::clamp<int64_t>(std::min(in.units(), macs / kMacsPerThread), 1,
                             torch::stable::get_num_threads());
}

Tensor empty(std::vector<int64_t> shape) {
  return torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
}

// Of the shape of x but for the channels; nothing where it is not wanted.
Tensor empty_activation(const Tensor& x, int64_t channels, bool wanted = true) {
  if (!wanted) {
    return empty({0});
  }
  return dfptkd::empty_activation(x.size(0), channels, x.size(2), x.size(3));
}

template <class From>
Tensor tensor_of(const From* values, int64_t count) {
  Tensor out = empty({count});
  std::copy_n(values, count, out.mutable_data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift,
                                           const std::optional<Tensor>& partial_weight,
                                           const Tensor& point_weight,
                                           const std::optional<Tensor>& residual, bool relu,
                                           int64_t groups) {
  Values values;
  Forward f{make_input(values, x, scale, shift, partial_weight, point_weight, residual, relu,
                       groups),
            {}, nullptr};
  const Input& in = f.in;
  const float* weight = values.of(point_weight);
  for (int64_t g = 0; g < groups; ++g) {
    f.weight.emplace_back(Matrix{weight + g * in.width() * in.depth(), 1, in.depth()}, in.depth(),
                          in.width(), kWalks.panel);
  }
  Tensor y = empty_activation(x, in.out_channels);
  f.y = y.mutable_data_ptr<float>();
  const int64_t chunks = chunks_of(in), length = 2 * in.out_channels;
  std::vector<double> sums(chunks * length);
  over_units(in, chunks, [&](int64_t i, int64_t begin, int64_t end) {
    kWalks.forward(f, begin, end, &sums[i * length]);
  });
  for (int64_t i = length; i < chunks * length; ++i) {
    sums[i % length] += sums[i];
  }
  return {y, tensor_of(sums.data(), in.out_channels),
          tensor_of(sums.data() + in.out_channels, in.out_channels)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_sums,
    const std::optional<Tensor>& grad_squared_sums, const Tensor& x,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const std::optional<Tensor>& partial_weight, const Tensor& point_weight,
    const std::optional<Tensor>& residual, const Tensor& y, bool relu, int64_t groups,
    bool needs_x, bool needs_weights, bool needs_residual) {
  Values values;
  Backward b{.in = make_input(values, x, scale, shift, partial_weight, point_weight, residual, relu,
                              groups),
             .weight = {},
             .flipped_conv = {},
             .grad_y = values.pixels_of(grad_y),
             .y = values.pixels_of(y),
             .grad_sums = {},
             .double_grad_squared_sums = {},
             .grad_x = nullptr,
             .grad_residual = nullptr,
             .needs_weights = needs_weights};
  const Input& in = b.in;
  STD_TORCH_CHECK(grad_y.numel() == in.pixels * in.out_channels && y.numel() == grad_y.numel(),
                  "grad_y and y: expected [N, C_out, H, W]");
  const float* weight = values.of(point_weight);
  for (int64_t g = 0; g < groups; ++g) {
    b.weight.emplace_back(Matrix{weight + g * in.width() * in.depth(), in.depth(), 1}, in.width(),
                          in.depth(), kWalks.panel);
  }
  if (grad_sums || grad_squared_sums) {
    b.grad_sums = values.copy(grad_sums, in.out_channels, 0);
    b.double_grad_squared_sums = values.copy(grad_squared_sums, in.out_channels, 0);
    for (float& value : b.double_grad_squared_sums) {
      value *= 2;
    }
  }
  if (in.has_conv) {
    b.flipped_conv =
        tap_order(values.of(*partial_weight), in.planes.channels, in.planes.kernel, true);
  }
  Tensor grad_x = empty_activation(x, in.channels, needs_x);
  Tensor grad_residual = empty_activation(x, in.channels, needs_residual);
  b.grad_x = needs_x ? grad_x.mutable_data_ptr<float>() : nullptr;
  b.grad_residual = needs_residual ? grad_residual.mutable_data_ptr<float>() : nullptr;

  const int64_t chunks = chunks_of(in);
  std::vector<Gradients> gradients(chunks, Gradients(b));
  over_units(in, chunks, [&](int64_t i, int64_t begin, int64_t end) {
    kWalks.backward(b, begin, end, gradients[i]);
  });
  Gradients& sum = gradients[0];
  for (int64_t i = 1; i < chunks; ++i) {
    sum.add(gradients[i]);
  }

  Tensor grad_point = empty({needs_weights ? in.out_channels : 0, in.depth()});
  Tensor grad_partial = empty({0});
  if (needs_weights) {
    float* to = grad_point.mutable_data_ptr<float>();
    for (int64_t n = 0; n < in.out_channels; ++n) {
      std::copy_n(&sum.point_weight[n * b.weight_row()], in.depth(), to + n * in.depth());
    }
    if (in.has_conv) {
      const int64_t channels = in.planes.channels, area = in.planes.kernel * in.planes.kernel;
      grad_partial = empty({channels, channels, in.planes.kernel, in.planes.kernel});
      float* taps = grad_partial.mutable_data_ptr<float>();
      for (int64_t i = 0; i < channels * channels * area; ++i) {
        const int64_t o = i / area / channels, c = i / area % channels, t = i % area;
        taps[i] = sum.conv_weight[(c * area + t) * channels + o];
      }
    }
  }
  const auto vector = [&](bool wanted, const std::vector<double>& from) {
    return tensor_of(from.data(), wanted ? in.channels : 0);
  };
  return {grad_x,       vector(needs_x && scale, sum.scale), vector(needs_x && shift, sum.shift),
          grad_partial, grad_point,                          grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("partial_pointwise_conv_native", TORCH_BOX(&forward));
  m.impl("partial_pointwise_conv_backward_native", TORCH_BOX(&backward));
}
