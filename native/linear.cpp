#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace bitnet {
namespace {

constexpr int kMaxCols = 65536;  // the bound of the int32 accumulators, see kernels.h
constexpr int kSlack = 1024;  // bytes after the last panel that a step of 64 inputs may read, and multiply by zero

Linear shaped(Scheme scheme, int rows, int cols, int n_groups) {
  if (rows < 1 || cols < 1 || cols > kMaxCols) throw std::invalid_argument("a matrix needs 1 or more rows and 1 to 65536 columns");
  Linear w;
  w.scheme = scheme, w.rows = rows, w.cols = cols;
  if (w.integer()) {
    w.padded_cols = round_up(cols, inputs_per_vector(scheme));
    w.group = n_groups == 1 ? w.padded_cols : round_up((cols + n_groups - 1) / n_groups, 16);
    if (n_groups < 1 || (cols + w.group - 1) / w.group != n_groups)
      throw std::invalid_argument("groups must be equal runs of inputs, a multiple of 16 long");
    w.n_groups = n_groups;
    w.panel_bytes = int64_t{64} * (w.padded_cols / inputs_per_vector(scheme));
    w.scales = Buffer<float>(size_t(w.n_panels()) * n_groups * kPanelRows);
  } else {
    w.padded_cols = round_up(cols, 4);
    w.panel_bytes = int64_t{w.padded_cols} * kPanelRows * (scheme == Scheme::f32 ? 4 : 2);
  }
  w.panels = Buffer<uint8_t>(size_t(w.n_panels()) * w.panel_bytes + kSlack);
  return w;
}

// Calls visit(col, byte, shift) for every fourth column of a row of an integer matrix: the codes of col..col+3 lie in the
// four bytes from `byte`, at bits shift and up.
template <typename Visit>
void for_each_quad(const Linear& w, int row, Visit visit) {
  int64_t byte = row / kPanelRows * w.panel_bytes + 4 * (row % kPanelRows);
  if (w.scheme == Scheme::int8) {
    for (int col = 0; col < w.cols; col += 4, byte += 64) visit(col, byte, 0);
  } else {
    for (int col = 0; col < w.cols; col += 4) visit(col, byte + 64 * int64_t(col / kTwoBitInputs), col / 2 % 8);
  }
}
}  // namespace

Linear repack_integer(Scheme scheme, const int8_t* codes, const float* scales, int rows, int cols, int n_groups) {
  Linear w = shaped(scheme, rows, cols, n_groups);
  const unsigned bias = code_bias(scheme), top = scheme == Scheme::ternary ? 2 : 255;
  uint8_t* packed = w.panels.data();
  for (int r = 0; r < rows; r++) {
    const int8_t* row = codes + int64_t{r} * cols;
    unsigned largest = 0;
    for_each_quad(w, r, [&](int col, int64_t byte, int shift) {
      for (int i = 0; i < std::min(4, cols - col); i++) {
        const unsigned code = unsigned(row[col + i]) + bias;  // below -bias wraps to a large one
        largest = std::max(largest, code);
        packed[byte + i] = uint8_t(packed[byte + i] | code << shift);
      }
    });
    if (largest > top) throw std::invalid_argument("a ternary weight is none of -1, 0, +1");
    for (int g = 0; g < n_groups; g++)
      w.scales[(size_t(r / kPanelRows) * n_groups + g) * kPanelRows + r % kPanelRows] = scales[int64_t{r} * n_groups + g];
  }
  return w;
}

Linear repack_dense(Scheme scheme, const void* values, int rows, int cols) {
  Linear w = shaped(scheme, rows, cols, 1);
  const size_t size = scheme == Scheme::f32 ? 4 : 2;
  for (int r = 0; r < rows; r++) {
    const uint8_t* from = static_cast<const uint8_t*>(values) + size_t(r) * cols * size;
    uint8_t* to = w.panels.data() + r / kPanelRows * w.panel_bytes + r % kPanelRows * size;
    for (int c = 0; c < cols; c++) std::memcpy(to + c * kPanelRows * size, from + c * size, size);
  }
  return w;
}

Linear empty_linear(Scheme scheme, int rows, int cols, int n_groups) { return shaped(scheme, rows, cols, n_groups); }

Linear random_linear(Scheme scheme, int rows, int cols, int n_groups, uint64_t seed) {
  Linear w = shaped(scheme, rows, cols, n_groups);
  uint64_t state = seed * 2 + 1;
  auto next = [&state] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 32; };
  const float scale = 1.0f / std::sqrt(float(cols));
  for (size_t i = 0; i < w.scales.size(); i++) w.scales[i] = scheme == Scheme::ternary ? scale : scale / 64;
  const size_t bytes = w.panels.size();
  if (scheme == Scheme::ternary) {
    for (size_t i = 0; i < bytes; i += 4) {  // four codes of 0..2 a byte: the low bit of each pair only where the high one is clear
      uint32_t r = uint32_t(next()), high = r & 0xaaaaaaaau, low = r & 0x55555555u & ~(high >> 1);
      r = high | low;
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  } else if (scheme == Scheme::int8) {
    for (size_t i = 0; i < bytes; i += 4) {
      const uint32_t r = uint32_t(next());
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  } else {
    if (scheme == Scheme::f32) throw std::invalid_argument("random f32 matrices are not made: benchmark f16 or bf16");
    // +-2^exponent * (1 + fraction), two at a time: no infinities, no subnormals
    const uint32_t mantissa = scheme == Scheme::f16 ? 10 : 7, bias = scheme == Scheme::f16 ? 15 : 127;
    const uint32_t exponent = uint32_t(std::ilogb(scale) + int(bias)) << mantissa, kept = 0x8000 | ((1u << mantissa) - 1);
    for (size_t i = 0; i < bytes; i += 4) {
      const uint32_t r = (uint32_t(next()) & (kept << 16 | kept)) | exponent << 16 | exponent;
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  }
  return w;
}

void dequantize_row(const Kernels& k, const Linear& w, int row, float* out) {
  if (w.integer()) {
    const int bias = code_bias(w.scheme), mask = w.scheme == Scheme::ternary ? 3 : 255;
    const float* scales = &w.scales[size_t(row / kPanelRows) * w.n_groups * kPanelRows + row % kPanelRows];
    for_each_quad(w, row, [&](int col, int64_t byte, int shift) {
      const float scale = scales[col / w.group * kPanelRows];
      for (int i = 0; i < std::min(4, w.cols - col); i++) out[col + i] = float((w.panels[byte + i] >> shift & mask) - bias) * scale;
    });
    return;
  }
  const size_t size = w.scheme == Scheme::f32 ? 4 : 2;
  const uint8_t* from = w.panels.data() + row / kPanelRows * w.panel_bytes + row % kPanelRows * size;
  if (w.scheme == Scheme::f16) {
    const int padded = round_up(w.cols, 16);
    std::vector<uint16_t> halves(padded);
    std::vector<float> wide(padded);
    for (int c = 0; c < w.cols; c++) std::memcpy(&halves[c], from + c * kPanelRows * size, size);
    const float one = 1;
    k.weigh_f16(&one, 1, 1, halves.data(), 1, padded, wide.data());  // 0 + 1 * half
    std::copy_n(wide.begin(), w.cols, out);
    return;
  }
  for (int c = 0; c < w.cols; c++) {
    uint32_t bits = 0;  // bf16 is the upper half of a float32; little-endian
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - size, from + c * kPanelRows * size, size);
    std::memcpy(out + c, &bits, 4);
  }
}

}  // namespace bitnet
