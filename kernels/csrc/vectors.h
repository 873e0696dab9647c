// Vectors of every instruction set, and register tiles of matrix products that are made of them.
// Code is a template of the machine and is compiled once for each; which copy runs is chosen when
// the library is loaded, by `instruction_set`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define DFPTKD_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define DFPTKD_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define DFPTKD_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace dfptkd {

constexpr int64_t kMaxLanes = 16;  // fp32 values of the widest vector
constexpr int kNarrow = 8;         // and of one that wastes less on narrow images
constexpr int64_t kSlack = 80;     // floats that a vector may read past the end of a buffer

// What the code is written for: lanes of a vector, and tiles of accumulators that fill the
// registers. Chosen at run time, so that one library serves every CPU.
template <int kLanes_, int kRows_, int kSpan_, int kOut_>
struct Machine {
  template <int kOther>
  using With = Machine<kOther, kRows_, kSpan_, kOut_>;  // vectors of other lanes
  using Narrow = With<std::min(kLanes_, kNarrow)>;
  static constexpr int kLanes = kLanes_;  // fp32 values of a vector
  static constexpr int kRows = kRows_;    // rows of a matrix tile
  static constexpr int kCols = 2;         // vectors in a row of it
  static constexpr int kPanel = kLanes * kCols;
  static constexpr int kSpan = kSpan_;    // vectors of a convolution tile, of 4 planes
  static constexpr int kOut = kOut_;      // planes of a weight gradient's tile, of up to 4 taps
  typedef float Vec __attribute__((vector_size(4 * kLanes_), aligned(4), may_alias));
};
using Avx512 = Machine<16, 8, 4, 4>;  // 32 registers
using Avx2 = Machine<8, 4, 2, 2>;     // 16 registers
using Baseline = Machine<4, 4, 2, 2>;

// Calls f with the constants 0 ... kCount - 1. Tiles that are indexed by constants alone live in
// registers; plain loops are unrolled too late for that, and the tile would go through memory.
template <int kCount, class F>
DFPTKD_INLINE void unroll(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

#define DFPTKD_EACH(index) [&](auto index) __attribute__((always_inline))

// By reference: passed by value, vectors are part of an ABI that depends on the machine.
template <class M>
DFPTKD_INLINE const typename M::Vec& vector_at(const float* p) {
  return *reinterpret_cast<const typename M::Vec*>(p);
}

template <class M>
DFPTKD_INLINE typename M::Vec& vector_at(float* p) {
  return *reinterpret_cast<typename M::Vec*>(p);
}

// The first `count` lanes, or all.
template <class M>
DFPTKD_INLINE void store(float* p, const typename M::Vec& v, int64_t count) {
  if (count >= M::kLanes) {
    vector_at<M>(p) = v;
  } else if (count > 0) {
    const typename M::Vec copy = v;  // v itself may stay in a register
    std::memcpy(p, &copy, count * sizeof(float));
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// As for torch's own kernels, ATEN_CPU_CAPABILITY=avx2 or default asks for less than there is.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = asked == nullptr ? "" : asked;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && has_avx512 && most != "avx2" && most != "default") {
    return InstructionSet::kAvx512;
  }
  if (has_avx2 && most != "default") {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

// A matrix in memory: element (i, j) at data[i * row + j * col].
struct Matrix {
  const float* data;
  int64_t row, col;
};

// Asks for memory that is read soon, a share at every step of a product: products are long, the
// processor does not look past them by itself, and the passes between them would wait for memory.
class Ahead {
 public:
  explicit Ahead(int64_t steps) : steps_(std::max<int64_t>(steps, 1)) {}

  void add(const float* from, int64_t floats) {
    streams_[count_++] = {from, from + floats, round_up((floats + steps_ - 1) / steps_, kLine)};
  }
  DFPTKD_INLINE void step() {
    for (int i = 0; i < count_; ++i) {
      Stream& s = streams_[i];
      for (int64_t n = 0; n < s.share && s.next < s.end; n += kLine, s.next += kLine) {
        __builtin_prefetch(s.next, 0, 2);
      }
    }
  }

 private:
  static constexpr int64_t kLine = 16;  // floats of a cache line
  struct Stream {
    const float *next, *end;
    int64_t share;
  };
  Stream streams_[4];
  int count_ = 0;
  int64_t steps_;
};

// kRows x (kCols vectors) of a @ b, kept in registers.
template <class M, int kRows, int kCols>
DFPTKD_INLINE void multiply_tile(const Matrix& a, const float* b, int64_t b_row, int64_t depth,
                                 typename M::Vec (&sum)[kRows][kCols]) {
  unroll<kRows>(DFPTKD_EACH(r) {
    unroll<kCols>(DFPTKD_EACH(c) { sum[r][c] = typename M::Vec{}; });
  });
  for (int64_t k = 0; k < depth; ++k) {
    typename M::Vec line[kCols];
    unroll<kCols>(DFPTKD_EACH(c) { line[c] = vector_at<M>(b + k * b_row + c * M::kLanes); });
    const float* column = a.data + k * a.col;
    unroll<kRows>(DFPTKD_EACH(r) {
      unroll<kCols>(DFPTKD_EACH(c) { sum[r][c] += column[r * a.row] * line[c]; });
    });
  }
}

}  // namespace dfptkd
