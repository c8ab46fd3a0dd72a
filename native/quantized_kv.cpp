#include "quantized_kv.h"

#include <cmath>

namespace bitnet {
namespace {
constexpr int kPage = KvCache::kPagePositions;
constexpr float kLargestScale = 65504;  // of f16

// One group: codes = round(x / scale) + bias, scale = |x|max / top rounded to f16. Returns the scale.
uint16_t quantize_group(const Kernels& k, const float* x, int n, int top, int bias, uint8_t* codes) {
  float most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
  float scale[16] = {std::min(most / float(top), kLargestScale)};
  uint16_t half[16];
  k.store_f16(scale, 16, half), k.load_f16(half, 16, scale);
  const float inverse = scale[0] > 0 ? 1.0f / scale[0] : 0.0f;
  for (int i = 0; i < n; i++) {
    const float limited = std::min(std::max(x[i] * inverse, float(-top)), float(top));
    const float shifted = limited + 12582912.0f;  // rounds half to even: the low bits are the integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[i] = uint8_t(bits - 0x4b400000 + bias);
  }
  return half[0];
}
}  // namespace

void store_key(const Kernels& k, KvCache& cache, int page, int slot, int layer, int head, const float* x, int head_dim) {
  const int bits = cache.format().key_bits, dim = cache.padded_dim(), group = cache.group(), n_groups = cache.n_groups();
  uint8_t codes[kMostHeadDim];
  uint16_t* scales = cache.key_scales(page, layer, head) + slot / 16 * n_groups * 16 + slot % 16;
  for (int g = 0; g < n_groups; g++) {
    const int n = std::min(group, head_dim - g * group);
    scales[16 * g] = quantize_group(k, x + g * group, n, bits == 4 ? 7 : 127, bits == 4 ? 8 : 128, codes + g * group);
  }
  std::fill(codes + head_dim, codes + dim, uint8_t(bits == 4 ? 8 : 128));
  uint8_t* to = cache.keys(page, layer, head) + int64_t{slot / 16} * 16 * dim * bits / 8 + 4 * (slot % 16);
  if (bits == 8)
    for (int d = 0; d < dim; d += 4, to += 64) std::memcpy(to, codes + d, 4);
  else
    for (int d = 0; d < dim; d += 8, to += 64)
      for (int i = 0; i < 4; i++) to[i] = uint8_t(codes[d + i] | codes[d + 4 + i] << 4);
}

void store_value(const Kernels& k, KvCache& cache, int page, int slot, int layer, int head, const float* x, int head_dim) {
  const int bits = cache.format().value_bits, dim = cache.padded_dim(), group = cache.group(), n_groups = cache.n_groups();
  uint8_t codes[kMostHeadDim];
  uint16_t* scales = cache.value_scales(page, layer, head) + slot;
  for (int g = 0; g < n_groups; g++) {
    const int n = std::min(group, head_dim - g * group);
    scales[kPage * g] = quantize_group(k, x + g * group, n, bits == 4 ? 7 : 127, bits == 4 ? 8 : 128, codes + g * group);
  }
  std::fill(codes + head_dim, codes + dim, uint8_t(bits == 4 ? 8 : 128));
  const int per_vector = 32 / bits;                                      // positions in a vector
  const int shift = bits == 4 ? slot % 8 / 4 * 4 : 0, mask = bits == 4 ? 15 << shift : 255;
  uint8_t* to = cache.values(page, layer, head) + slot / per_vector * 64 + slot % 4;
  for (int p = 0; p < dim / 16; p++, to += int64_t{kPage} * 16 * bits / 8)
    for (int r = 0; r < 16; r++) to[4 * r] = uint8_t((to[4 * r] & ~mask) | codes[16 * p + r] << shift);
}

void QuantizedAttention::set_queries(const Kernels& k, const KvCache& cache, const float* queries, int n, float attention_scale) {
  const int dim = cache.padded_dim(), group = cache.group(), n_groups = cache.n_groups();
  n_ = n;
  q_.reserve(size_t(n) * dim), steps_.reserve(n), sums_.reserve(size_t(n) * n_groups);
  for (int i = 0; i < n; i++) {
    int8_t* q = q_.data() + int64_t{i} * dim;
    int32_t all;
    steps_[i] = k.quantize(queries + int64_t{i} * dim, dim, q, &all) * attention_scale;
    if (n_groups == 1) sums_[i] = all;
    else
      for (int g = 0; g < n_groups; g++) sums_[i * n_groups + g] = k.sum_i8(q + g * group, group);
  }
}

void QuantizedAttention::scores(const Kernels& k, KvCache& cache, int page, int layer, int head, int first, int n_blocks, float* out, int64_t stride) {
  const int bits = cache.format().key_bits, dim = cache.padded_dim(), group = cache.group(), n_groups = cache.n_groups(), vectors = group * bits / 32;
  runs_.resize(n_groups);
  for (int g = 0; g < n_groups; g++) runs_[g] = {g * group, group, g * vectors, vectors, g, 0};
  const int64_t panel_bytes = int64_t{16} * dim * bits / 8;
  const IntegerMatrix w{cache.keys(page, layer, head) + first * panel_bytes, panel_bytes, nullptr, cache.key_scales(page, layer, head) + int64_t{first} * n_groups * 16,
                        int64_t{16} * n_groups, int(stride), bits == 4 ? 8 : 128};
  const QuantizedRows x{q_.data(), dim, runs_.data(), n_groups, sums_.data(), steps_.data(), 1, false, n_};
  (bits == 4 ? k.multiply_i4 : k.multiply_i8)(w, x, 0, n_blocks, out);
}

void QuantizedAttention::weigh(const Kernels& k, KvCache& cache, int page, int layer, int head, int first, int n_positions, const float* weights,
                               int64_t stride, int n, float* out) {
  static const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const int bits = cache.format().value_bits, dim = cache.padded_dim(), group = cache.group(), per_vector = 32 / bits;
  const int64_t panel_bytes = int64_t{kPage} * 16 * bits / 8;
  const int n_runs = (n_positions + kRun - 1) / kRun;
  parts_.reserve(size_t(n) * 2 * kPage), run_steps_.reserve(size_t(n) * 2 * n_runs), run_sums_.reserve(size_t(n) * 2 * n_runs);
  weighed_.reserve(size_t(n) * 2 * group);
  runs_.resize(n_runs);
  for (int r = 0; r < n_runs; r++) {
    const int inputs = std::min(kRun, round_up(n_positions - r * kRun, 16));
    runs_[r] = {r * kRun, inputs, (first + r * kRun) / per_vector, inputs / per_vector, 0, r};
  }
  const QuantizedRows x{parts_.data(), kPage, runs_.data(), n_runs, run_sums_.data(), run_steps_.data(), n_runs, true, 2 * n};
  for (int g = 0; g < cache.n_groups(); g++) {
    const uint16_t* scales = cache.value_scales(page, layer, head) + g * kPage + first;
    for (int i = 0; i < n; i++)
      for (int r = 0; r < n_runs; r++) {
        int8_t* high = parts_.data() + int64_t{2 * i} * kPage + r * kRun;
        const int at = 2 * i * n_runs + r;
        k.split_weights(weights + i * stride + r * kRun, scales + r * kRun, runs_[r].inputs, high, high + kPage, &run_steps_[at], &run_steps_[at + n_runs],
                        &run_sums_[at], &run_sums_[at + n_runs]);
      }
    const IntegerMatrix w{cache.values(page, layer, head) + g * (group / 16) * panel_bytes, panel_bytes, ones, nullptr, 0, group, bits == 4 ? 8 : 128};
    (bits == 4 ? k.multiply_i4 : k.multiply_i8)(w, x, 0, group / 16, weighed_.data());
    for (int i = 0; i < n; i++) {
      float* high = weighed_.data() + int64_t{2 * i} * group;
      k.add(high, high + group, group), k.add(out + int64_t{i} * dim + g * group, high, group);
    }
  }
}

}  // namespace bitnet
