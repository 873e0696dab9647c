// CPU kernels of dfptkd::dual_path_loss_native and dfptkd::distillation_loss_native, in fp32
// (half precision is converted on the way in and rounded once on the way out). The equations and
// semantics are those of kernels/dual_path_loss.py; here is one row, with d = z - max(z):
//
//   a = d / tau,  e = exp(a),  f = exp(d),  softmax(z / tau) = e / sum e,  softmax(z) = f / sum f
//   KL(q || p) = sum_c q (a_q - a_p - (log sum e_q - log sum e_p))         exactly 0 where q is p
//   dCE/dz = f / sum f - y,  dKL/dz = (p - q) / tau,  reversed: p (log p - log q - KL) / tau
//
// A row stays in cache while it is passed over: the logits are read once and each gradient written
// once. Rows are padded to whole vectors by masked classes (-inf), which add nothing anywhere.
// Sums run in fp32 over a block and in fp64 over blocks; every reduction has a fixed order.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kVector = 16;               // fp32 lanes of the widest vectors
constexpr int64_t kBlock = 256;               // elements that are summed in fp32
constexpr int64_t kElementsPerThread = 4096;  // less is not worth waking a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Vector loops ------------------------------------------------------------------------------------

// exp(x) for x <= 0 to about one unit in the last place; subnormal results become 0.
// x = n log 2 + r, |r| <= log(2) / 2; polynomial of Cephes' expf (S. Moshier) in r.
inline __attribute__((always_inline)) float exp_of_negative(float x) {
  constexpr float kSmallest = -87.3f;        // exp of it is the smallest normal number, nearly
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < kSmallest ? kSmallest : x;  // keeps NaN
  const float shifted = bounded * 1.44269504f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The low bits of `shifted` hold n: moved into the exponent they multiply by 2^n.
  const uint32_t scaled = std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23);
  return x < kSmallest ? 0.0f : std::bit_cast<float>(scaled);
}

// Largest value, NaN left out; -inf where there is none.
DFPTKD_CLONES
float largest(const float* __restrict z, int64_t count) {
  float max = -kInfinity;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < count; ++j) {
    max = z[j] > max ? z[j] : max;
  }
  return max;
}

DFPTKD_CLONES
int64_t count_equal(const float* __restrict z, int64_t count, float value) {
  int32_t equal = 0;
#pragma omp simd reduction(+ : equal)
  for (int64_t j = 0; j < count; ++j) {
    equal += z[j] == value;
  }
  return equal;
}

// 1 / tau in two parts: a product with both is as exact as the division, and faster.
struct Reciprocal {
  explicit Reciprocal(double tau)
      : high(static_cast<float>(1 / tau)), low(static_cast<float>(1 / tau - high)) {}

  float high, low;
};

// d / tau for d <= 0.
inline __attribute__((always_inline)) float tempered(float d, Reciprocal per_tau) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  const float finite = d < kLowest ? kLowest : d;  // -inf times low may be NaN
  return d * per_tau.high + finite * per_tau.low;
}

// In place z becomes a = (z - max) / tau; writes e = exp(a) and returns its sum.
DFPTKD_CLONES
double exponentials(float* __restrict z, int64_t count, float max, Reciprocal per_tau,
                    float* __restrict exps) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) {
      const float a = tempered(z[j] - max, per_tau);
      const float e = exp_of_negative(a);
      z[j] = a;
      exps[j] = e;
      part += e;
    }
    sum += part;
  }
  return sum;
}

// The same, and f = exp(z - max) with its sum.
DFPTKD_CLONES
std::tuple<double, double> exponentials_of_learner(float* __restrict z, int64_t count, float max,
                                                   Reciprocal per_tau, float* __restrict exps,
                                                   float* __restrict shifted_exps) {
  double sum = 0, shifted_sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float part = 0, shifted_part = 0;
#pragma omp simd reduction(+ : part, shifted_part)
    for (int64_t j = begin; j < end; ++j) {
      const float d = z[j] - max;
      const float a = tempered(d, per_tau);
      const float e = exp_of_negative(a), f = exp_of_negative(d);
      z[j] = a;
      exps[j] = e;
      shifted_exps[j] = f;
      part += e;
      shifted_part += f;
    }
    sum += part;
    shifted_sum += shifted_part;
  }
  return {sum, shifted_sum};
}

// The sum of e_q (a_q - a_p - offset); classes of probability 0 under q add nothing.
DFPTKD_CLONES
double divergence(const float* __restrict exps_q, const float* __restrict scaled_q,
                  const float* __restrict scaled_p, float offset, int64_t count) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) {
      const float difference = (scaled_q[j] - scaled_p[j]) - offset;
      part += exps_q[j] * (scaled_q[j] == -kInfinity ? 0.0f : difference);
    }
    sum += part;
  }
  return sum;
}

// sum (z - max)
DFPTKD_CLONES
double sum_of_shifted(const float* __restrict z, int64_t count, float max) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) {
      part += z[j] - max;
    }
    sum += part;
  }
  return sum;
}

// What the cross-entropy takes from the labels; y' = keep * y + uniform are the smoothed ones.
struct Smoothing {
  float keep, uniform;
};

// sum y' and sum y' (z - max - log_sum), the latter over y' > 0 alone.
DFPTKD_CLONES
std::tuple<double, double> soft_label_sums(const float* __restrict z, const float* __restrict y,
                                           int64_t count, float max, float log_sum,
                                           Smoothing smoothing) {
  double mass = 0, log_likelihood = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float mass_part = 0, part = 0;
#pragma omp simd reduction(+ : mass_part, part)
    for (int64_t j = begin; j < end; ++j) {
      const float label = smoothing.keep * y[j] + smoothing.uniform;
      const float term = label * ((z[j] - max) - log_sum);
      mass_part += label;
      part += label == 0.0f ? 0.0f : term;
    }
    mass += mass_part;
    log_likelihood += part;
  }
  return {mass, log_likelihood};
}

// Factors and streams that make one learner's gradient. A factor of 0 comes with a stream of zeros,
// so that what a zero weight switched off cannot spread a NaN.
struct Gradient {
  float label = 0, ce = 0;  // of f ce - y', and there of f
  Smoothing smoothing{};
  const float *shifted_exps, *y;
  const float *scaled, *exps;                // a and e of the learner
  float own = 0;                             // of e
  float supervisor[2] = {0, 0};              // of e_q; reversed, of e (log p - log q - KL)
  const float* supervisor_stream[2];         // e_q; reversed, a_q
  float offset[2] = {0, 0}, kl[2] = {0, 0};  // log p - log q = a_p - a_q - offset
};

DFPTKD_CLONES
void write_gradient(const Gradient& g, int64_t count, float* __restrict grad) {
  const float* __restrict f = g.shifted_exps;
  const float* __restrict y = g.y;
  const float* __restrict e = g.exps;
  const float* __restrict e0 = g.supervisor_stream[0];
  const float* __restrict e1 = g.supervisor_stream[1];
  const float label = g.label, ce = g.ce, own = g.own, w0 = g.supervisor[0], w1 = g.supervisor[1];
  const Smoothing smoothing = g.smoothing;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float smoothed = smoothing.keep * y[j] + smoothing.uniform;
    const float from_labels = label * (f[j] * ce - smoothed);
    grad[j] = from_labels + ((own * e[j] - w0 * e0[j]) - w1 * e1[j]);
  }
}

// The same with the KL terms reversed.
DFPTKD_CLONES
void write_reversed_gradient(const Gradient& g, int64_t count, float* __restrict grad) {
  const float* __restrict f = g.shifted_exps;
  const float* __restrict y = g.y;
  const float* __restrict e = g.exps;
  const float* __restrict a = g.scaled;
  const float* __restrict a0 = g.supervisor_stream[0];
  const float* __restrict a1 = g.supervisor_stream[1];
  const float label = g.label, ce = g.ce, w0 = g.supervisor[0], w1 = g.supervisor[1];
  const float offset0 = g.offset[0], offset1 = g.offset[1], kl0 = g.kl[0], kl1 = g.kl[1];
  const Smoothing smoothing = g.smoothing;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float smoothed = smoothing.keep * y[j] + smoothing.uniform;
    const float from_labels = label * (f[j] * ce - smoothed);
    const float excess0 = ((a[j] - a0[j]) - offset0) - kl0;
    const float excess1 = ((a[j] - a1[j]) - offset1) - kl1;
    const float from_paths = e[j] * (w0 * excess0 + w1 * excess1);
    grad[j] = from_labels + (a[j] == -kInfinity ? 0.0f : from_paths);
  }
}

// What a learner's gradient takes in `walk_once`: label (f ce - uniform) + own e - teacher e_T -
// other e_other.
struct Factors {
  float label, ce, uniform, own, teacher, other;
};

// What `walk_once` reads of a path: a, e and, for a learner, f.
struct Streams {
  const float *scaled, *exps, *shifted_exps;
};

// The common case in one walk over the row: hard labels, forward KL, all numbers finite. Sums of
// e_q (a_q - a_p - offset) for KL(T || S), KL(P || S), KL(T || P), KL(S || P), and both gradients.
DFPTKD_CLONES
void walk_once(const Streams& student, const Streams& prompt, const Streams& teacher,
               const float (&offset)[4], const Factors& for_student, const Factors& for_prompt,
               int64_t count, double (&sums)[4], float* __restrict grad_s,
               float* __restrict grad_p) {
  const float* __restrict a_s = student.scaled;
  const float* __restrict a_p = prompt.scaled;
  const float* __restrict a_t = teacher.scaled;
  const float* __restrict e_s = student.exps;
  const float* __restrict e_p = prompt.exps;
  const float* __restrict e_t = teacher.exps;
  const float* __restrict f_s = student.shifted_exps;
  const float* __restrict f_p = prompt.shifted_exps;
  const float o_ts = offset[0], o_ps = offset[1], o_tp = offset[2], o_sp = offset[3];
  const Factors s = for_student, p = for_prompt;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float ts = 0, ps = 0, tp = 0, sp = 0;
#pragma omp simd reduction(+ : ts, ps, tp, sp)
    for (int64_t j = begin; j < end; ++j) {
      const bool has_s = a_s[j] != -kInfinity, has_p = a_p[j] != -kInfinity,
                 has_t = a_t[j] != -kInfinity;
      ts += has_t ? e_t[j] * ((a_t[j] - a_s[j]) - o_ts) : 0.0f;
      ps += has_p ? e_p[j] * ((a_p[j] - a_s[j]) - o_ps) : 0.0f;
      tp += has_t ? e_t[j] * ((a_t[j] - a_p[j]) - o_tp) : 0.0f;
      sp += has_s ? e_s[j] * ((a_s[j] - a_p[j]) - o_sp) : 0.0f;
      const float ce_s = s.label * (f_s[j] * s.ce - s.uniform);
      const float ce_p = p.label * (f_p[j] * p.ce - p.uniform);
      grad_s[j] = ce_s + ((s.own * e_s[j] - s.teacher * e_t[j]) - s.other * e_p[j]);
      grad_p[j] = ce_p + ((p.own * e_p[j] - p.teacher * e_t[j]) - p.other * e_s[j]);
    }
    sums[0] += ts;
    sums[1] += ps;
    sums[2] += tp;
    sums[3] += sp;
  }
}

// One row -----------------------------------------------------------------------------------------

struct Options {
  int64_t classes;
  double tau, label_smoothing;
  bool reverse_kl;

  int64_t padded() const { return (classes + kVector - 1) / kVector * kVector; }
  Smoothing smoothing() const {
    return {static_cast<float>(1 - label_smoothing), static_cast<float>(label_smoothing / classes)};
  }
};

// What is known of one row.
struct Path {
  const float* logits;                  // [C]
  float *scaled, *exps, *shifted_exps;  // padded: a, e and, for a learner, f
  float max = 0;
  double sum = 0, log_sum = 0;  // of e
  double shifted_sum = 0;       // of f
};

constexpr int64_t kScratch = 3;  // padded rows that a path needs

Path read_path(const float* row, const Options& options, float* scratch, bool learns) {
  const int64_t padded = options.padded();
  const Reciprocal per_tau(options.tau);
  Path path{row, scratch, scratch + padded, scratch + 2 * padded};
  std::fill(std::copy_n(row, options.classes, path.scaled), path.scaled + padded, -kInfinity);
  path.max = largest(path.scaled, padded);
  if (learns && options.tau != 1) {
    std::tie(path.sum, path.shifted_sum) = exponentials_of_learner(
        path.scaled, padded, path.max, per_tau, path.exps, path.shifted_exps);
  } else {
    path.sum = path.shifted_sum = exponentials(path.scaled, padded, path.max, per_tau, path.exps);
    std::copy_n(path.exps, learns ? padded : 0, path.shifted_exps);
  }
  path.log_sum = std::log(path.sum);
  return path;
}

// As torch.argmax: the first of equals, and a NaN above all numbers.
int64_t first_largest(const float* z, int64_t count) {
  int64_t best = 0;
  for (int64_t j = 1; j < count && !std::isnan(z[best]); ++j) {
    best = z[j] > z[best] || std::isnan(z[j]) ? j : best;
  }
  return best;
}

bool is_hit(const Path& path, int64_t label, int64_t classes) {
  if (std::isnan(path.sum)) {
    return first_largest(path.logits, classes) == label;
  }
  return path.logits[label] == path.max && count_equal(path.logits, label, path.max) == 0;
}

struct Label {
  int64_t index;               // the true class, or the most probable one
  const float* probabilities;  // null for a hard label
};

// Returns the cross-entropy and puts its gradient into `g`. At the class of a hard label f becomes
// f - keep sum f, because there the difference must be taken before it is rounded.
double cross_entropy(const Path& path, const Label& label, const Options& options, double weight,
                     Gradient& g) {
  const int64_t classes = options.classes;
  const double log_sum = std::log(path.shifted_sum), smoothing = options.label_smoothing;
  double mass = 1, loss;
  if (label.probabilities) {
    std::tie(mass, loss) =
        soft_label_sums(path.logits, label.probabilities, classes, path.max,
                        static_cast<float>(log_sum), options.smoothing());
    loss = -loss;
  } else {
    loss = (1 - smoothing) * (log_sum - (path.logits[label.index] - path.max));
    if (smoothing > 0) {
      const double shifted = sum_of_shifted(path.logits, classes, path.max);
      loss += smoothing / classes * (classes * log_sum - shifted);
    }
    float& at_label = path.shifted_exps[label.index];
    at_label = static_cast<float>(at_label - (1 - smoothing) * path.shifted_sum);
  }
  if (weight != 0) {
    g.ce = static_cast<float>(mass / path.shifted_sum);
    g.shifted_exps = path.shifted_exps;
    g.label = static_cast<float>(weight);
    g.smoothing = options.smoothing();
    g.y = label.probabilities ? label.probabilities : g.y;
  }
  return loss;
}

// Returns tau^2 KL between learner and supervisor number k and adds its gradient to `g`.
double distillation(const Path& learner, const Path& supervisor, const Options& options,
                    double weight, int k, Gradient& g) {
  const Path& q = options.reverse_kl ? learner : supervisor;
  const Path& p = options.reverse_kl ? supervisor : learner;
  const float offset = static_cast<float>(q.log_sum - p.log_sum);
  const double kl = divergence(q.exps, q.scaled, p.scaled, offset, options.padded()) / q.sum;
  if (weight != 0) {
    g.exps = learner.exps;
    g.scaled = learner.scaled;
    g.supervisor[k] = static_cast<float>(weight * options.tau / q.sum);
    g.supervisor_stream[k] = options.reverse_kl ? supervisor.scaled : supervisor.exps;
    g.offset[k] = offset;
    g.kl[k] = static_cast<float>(kl);
  }
  return options.tau * options.tau * kl;
}

// All that one learner needs: terms [3] (cross-entropy, then a KL for each supervisor that is not
// null) and its gradient under weights [3], which are divided by the number of rows.
void learn(const Path& learner, const Path* const (&supervisors)[2], const Label& label,
           const Options& options, const double* weights, const float* zeros, double* terms,
           float* grad) {
  Gradient g;
  g.shifted_exps = g.y = g.scaled = g.exps = g.supervisor_stream[0] = g.supervisor_stream[1] = zeros;
  terms[0] = cross_entropy(learner, label, options, weights[0], g);
  double own = 0;
  for (int k = 0; k < 2; ++k) {
    if (supervisors[k]) {
      terms[1 + k] = distillation(learner, *supervisors[k], options, weights[1 + k], k, g);
      own += weights[1 + k];
    }
  }
  if (options.reverse_kl) {
    write_reversed_gradient(g, options.classes, grad);
  } else {
    g.own = own != 0 ? static_cast<float>(own * options.tau / learner.sum) : 0.0f;
    write_gradient(g, options.classes, grad);
  }
}

Factors factors(const Path& own, const Path& teacher, const Path& other, const Gradient& labels,
                const Options& options, const double* weights) {
  const double tau = options.tau;
  return {labels.label,
          labels.ce,
          labels.label != 0 ? labels.smoothing.uniform : 0.0f,
          static_cast<float>((weights[1] + weights[2]) * tau / own.sum),
          static_cast<float>(weights[1] * tau / teacher.sum),
          static_cast<float>(weights[2] * tau / other.sum)};
}

// Both learners of a row in the common case (see `walk_once`); the arguments are those of `learn`.
void learn_both(const Path& student, const Path& prompt, const Path& teacher, const Label& label,
                const Options& options, const double* weights, double* terms, float* grad_s,
                float* grad_p) {
  Gradient labels_s, labels_p;
  terms[0] = cross_entropy(student, label, options, weights[0], labels_s);
  terms[3] = cross_entropy(prompt, label, options, weights[3], labels_p);
  const auto offset = [](const Path& q, const Path& p) {
    return static_cast<float>(q.log_sum - p.log_sum);
  };
  const auto streams = [](const Path& path) {
    return Streams{path.scaled, path.exps, path.shifted_exps};
  };
  double sums[4] = {0, 0, 0, 0};
  walk_once(streams(student), streams(prompt), streams(teacher),
            {offset(teacher, student), offset(prompt, student), offset(teacher, prompt),
             offset(student, prompt)},
            factors(student, teacher, prompt, labels_s, options, weights),
            factors(prompt, teacher, student, labels_p, options, weights + 3), options.classes,
            sums, grad_s, grad_p);
  const double scale = options.tau * options.tau;
  terms[1] = scale * sums[0] / teacher.sum;
  terms[2] = scale * sums[1] / prompt.sum;
  terms[4] = scale * sums[2] / teacher.sum;
  terms[5] = scale * sums[3] / student.sum;
}

// A batch -----------------------------------------------------------------------------------------

// Every call into PyTorch costs as much as several short rows: none where nothing changes.
Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Rows [B, C] in fp32 with any stride over B.
struct Rows {
  explicit Rows(const Tensor& given)
      : tensor(as_dtype(given.stride(1) == 1 ? given : torch::stable::contiguous(given),
                        ScalarType::Float)),
        data(tensor.const_data_ptr<float>()),
        stride(tensor.stride(0)) {}

  const float* operator[](int64_t row) const { return data + row * stride; }

  Tensor tensor;
  const float* data;
  int64_t stride;
};

// int64 [B], or probabilities [B, C].
class Labels {
 public:
  Labels(const Tensor& target, int64_t classes, int64_t ignore_index)
      : classes_(classes), ignore_index_(ignore_index), count_(target.size(0)) {
    if (target.scalar_type() != ScalarType::Long) {
      soft_.emplace(target);
      return;
    }
    hard_.emplace(as_contiguous(target));
    index_ = hard_->const_data_ptr<int64_t>();
    for (int64_t row = 0; row < target.size(0); ++row) {
      count_ -= index_[row] == ignore_index;
      if (index_[row] != ignore_index && (index_[row] < 0 || index_[row] >= classes)) {
        // Becomes Python's IndexError.
        throw std::out_of_range("target: expected labels in 0.." + std::to_string(classes - 1) +
                                ", got " + std::to_string(index_[row]) + " in row " +
                                std::to_string(row));
      }
    }
  }

  bool counts(int64_t row) const { return soft_ || index_[row] != ignore_index_; }
  int64_t count() const { return count_; }  // of rows that count

  Label operator[](int64_t row) const {
    if (!soft_) {
      return {index_[row], nullptr};
    }
    return {first_largest((*soft_)[row], classes_), (*soft_)[row]};
  }

 private:
  int64_t classes_, ignore_index_, count_;
  std::optional<Rows> soft_;
  std::optional<Tensor> hard_;
  const int64_t* index_ = nullptr;
};

struct Sums {
  std::vector<double> terms;  // means
  double total;
  std::vector<int64_t> hits;
};

// Calls row(r, scratch, zeros, terms, hits) for every row that counts and blanks the gradients of
// the others; terms are written by row and added in the order of the rows.
template <class Row>
Sums over_rows(int64_t rows, int64_t num_paths, const Labels& labels, const Options& options,
               const std::vector<double>& weights, const std::vector<float*>& grads, Row row) {
  const int64_t num_terms = weights.size(), num_hits = grads.size(), classes = options.classes;
  std::vector<double> terms(rows * num_terms);
  std::vector<uint8_t> hits(rows * num_hits);
  torch::stable::parallel_for(
      0, rows, kElementsPerThread / classes + 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(num_paths * kScratch * options.padded() + classes);
        const float* zeros = scratch.data() + num_paths * kScratch * options.padded();
        for (int64_t r = begin; r < end; ++r) {
          if (labels.counts(r)) {
            row(r, scratch.data(), zeros, &terms[r * num_terms], &hits[r * num_hits]);
          } else {
            for (float* grad : grads) {
              std::fill_n(grad + r * classes, classes, 0.0f);
            }
          }
        }
      });

  Sums sums{std::vector<double>(num_terms), 0, std::vector<int64_t>(num_hits)};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < num_terms; ++i) {
      sums.terms[i] += terms[r * num_terms + i];
    }
    for (int64_t i = 0; i < num_hits; ++i) {
      sums.hits[i] += hits[r * num_hits + i];
    }
  }
  for (int64_t i = 0; i < num_terms; ++i) {
    sums.terms[i] /= std::max<int64_t>(labels.count(), 1);
    sums.total += weights[i] != 0 ? weights[i] * sums.terms[i] : 0;
  }
  return sums;
}

std::vector<double> as_numbers(const Tensor& weights, int64_t count) {
  STD_TORCH_CHECK(weights.numel() == count && weights.scalar_type() == ScalarType::Float,
                  "weights: expected fp32 [", count, "]");
  const Tensor dense = as_contiguous(weights);
  const float* values = dense.const_data_ptr<float>();
  return {values, values + count};
}

std::vector<double> divided(std::vector<double> weights, int64_t count) {
  for (double& weight : weights) {
    weight /= std::max<int64_t>(count, 1);
  }
  return weights;
}

// The Python side has checked the arguments; this keeps a direct call of an operator in bounds.
void check_shapes(const Tensor& student, const std::vector<Tensor>& others, const Tensor& target) {
  const auto fits = [&](const Tensor& z) {
    return z.dim() == 2 && z.size(0) == student.size(0) && z.size(1) == student.size(1);
  };
  for (const Tensor& z : others) {
    STD_TORCH_CHECK(fits(z) && z.scalar_type() != ScalarType::Double,
                    "the native loss takes logits up to fp32 of one shape [B, C]");
  }
  const bool hard = target.scalar_type() == ScalarType::Long && target.dim() == 1;
  STD_TORCH_CHECK(student.size(1) > 0 && target.size(0) == student.size(0) && (hard || fits(target)),
                  "target: expected int64 [B] or probabilities [B, C]");
}

template <class T, class From>
Tensor tensor_of(From&& values, ScalarType dtype, const std::vector<int64_t>& shape) {
  Tensor out = torch::stable::empty({shape.data(), shape.size()}, dtype);
  std::copy(std::begin(values), std::end(values), out.mutable_data_ptr<T>());
  return out;
}

Tensor empty_gradient(const Tensor& logits) {
  return torch::stable::empty({logits.size(0), logits.size(1)}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_path_loss(
    const Tensor& student, const Tensor& prompt, const Tensor& teacher, const Tensor& target,
    const Tensor& weights, double tau, double label_smoothing, int64_t ignore_index,
    bool reverse_kl) {
  check_shapes(student, {student, prompt, teacher}, target);
  const Options options{student.size(1), tau, label_smoothing, reverse_kl};
  const int64_t rows = student.size(0), classes = options.classes;
  const int64_t stride = kScratch * options.padded();
  const Rows s(student), p(prompt), t(teacher);
  const Labels labels(target, classes, ignore_index);
  const std::vector<double> numbers = as_numbers(weights, 6);
  const std::vector<double> shares = divided(numbers, labels.count());
  Tensor grad_student = empty_gradient(student), grad_prompt = empty_gradient(prompt);
  float* grad_s = grad_student.mutable_data_ptr<float>();
  float* grad_p = grad_prompt.mutable_data_ptr<float>();

  const Sums sums = over_rows(
      rows, 3, labels, options, numbers, {grad_s, grad_p},
      [&](int64_t r, float* scratch, const float* zeros, double* terms, uint8_t* hits) {
        const Path path_s = read_path(s[r], options, scratch, true);
        const Path path_p = read_path(p[r], options, scratch + stride, true);
        const Path path_t = read_path(t[r], options, scratch + 2 * stride, false);
        const Label label = labels[r];
        const bool finite = std::isfinite(path_s.sum + path_p.sum + path_t.sum);
        if (finite && !label.probabilities && !options.reverse_kl) {
          learn_both(path_s, path_p, path_t, label, options, shares.data(), terms,
                     grad_s + r * classes, grad_p + r * classes);
        } else {
          learn(path_s, {&path_t, &path_p}, label, options, &shares[0], zeros, terms,
                grad_s + r * classes);
          learn(path_p, {&path_t, &path_s}, label, options, &shares[3], zeros, terms + 3,
                grad_p + r * classes);
        }
        hits[0] = is_hit(path_s, label.index, classes);
        hits[1] = is_hit(path_p, label.index, classes);
      });
  return {tensor_of<float>(std::vector{sums.total}, ScalarType::Float, {}),
          tensor_of<float>(sums.terms, ScalarType::Float, {6}),
          tensor_of<int64_t>(std::vector{sums.hits[0]}, ScalarType::Long, {}),
          tensor_of<int64_t>(std::vector{sums.hits[1]}, ScalarType::Long, {}),
          as_dtype(grad_student, student.scalar_type()),
          as_dtype(grad_prompt, prompt.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(
    const Tensor& student, const Tensor& teacher, const Tensor& target, const Tensor& weights,
    double tau, double label_smoothing, int64_t ignore_index, bool reverse_kl) {
  check_shapes(student, {student, teacher}, target);
  const Options options{student.size(1), tau, label_smoothing, reverse_kl};
  const int64_t rows = student.size(0), classes = options.classes;
  const int64_t stride = kScratch * options.padded();
  const Rows s(student), t(teacher);
  const Labels labels(target, classes, ignore_index);
  const std::vector<double> numbers = as_numbers(weights, 2);
  const std::vector<double> shares = divided(numbers, labels.count());
  Tensor grad_student = empty_gradient(student);
  float* grad_s = grad_student.mutable_data_ptr<float>();

  const Sums sums = over_rows(
      rows, 2, labels, options, numbers, {grad_s},
      [&](int64_t r, float* scratch, const float* zeros, double* terms, uint8_t* hits) {
        const Path path_s = read_path(s[r], options, scratch, true);
        const Path path_t = read_path(t[r], options, scratch + stride, false);
        const Label label = labels[r];
        learn(path_s, {&path_t, nullptr}, label, options, shares.data(), zeros, terms,
              grad_s + r * classes);
        hits[0] = is_hit(path_s, label.index, classes);
      });
  return {tensor_of<float>(std::vector{sums.total}, ScalarType::Float, {}),
          tensor_of<float>(sums.terms, ScalarType::Float, {2}),
          tensor_of<int64_t>(std::vector{sums.hits[0]}, ScalarType::Long, {}),
          as_dtype(grad_student, student.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfptkd, CPU, m) {
  m.impl("dual_path_loss_native", TORCH_BOX(&dual_path_loss));
  m.impl("distillation_loss_native", TORCH_BOX(&distillation_loss));
}
