// What several of the CPU kernels share.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// One clone of a hot loop for each instruction set, chosen when the library is loaded. By level of
// the architecture, because "avx2" alone has no fused multiply-add.
#if defined(__x86_64__) && defined(__linux__)
#define DFPTKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DFPTKD_CLONES
#endif

namespace dfptkd {

// fp32 [count, channels, height, width] in channels_last.
inline torch::stable::Tensor empty_activation(int64_t count, int64_t channels, int64_t height,
                                              int64_t width) {
  return torch::stable::empty({count, channels, height, width},
                              torch::headeronly::ScalarType::Float, std::nullopt, std::nullopt,
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace dfptkd
