// Weight matrices as they lie in memory, and how they get there.
#pragma once
#include <cstdint>

#include "buffer.h"
#include "kernels/kernels.h"

namespace bitnet {

enum class Scheme { ternary, int8, f16, bf16, f32 };

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int inputs_per_vector(Scheme s) { return s == Scheme::ternary ? kTwoBitInputs : kInt8Inputs; }
inline int code_bias(Scheme s) { return s == Scheme::ternary ? 1 : 128; }  // code = weight + bias

struct Linear {
  Scheme scheme = Scheme::f32;
  int rows = 0, cols = 0;      // outputs, inputs
  int padded_cols = 0;         // a multiple of the inputs in one vector of the scheme
  int group = 0;               // inputs that share a scale: a multiple of 16, or padded_cols
  int n_groups = 0;
  int64_t panel_bytes = 0;
  Buffer<uint8_t> panels;      // [ceil(rows/16), panel_bytes]
  Buffer<float> scales;        // [ceil(rows/16), n_groups, 16], integer schemes only
  Buffer<float> bias;          // [rows], added to the product; usually empty

  bool integer() const { return scheme == Scheme::ternary || scheme == Scheme::int8; }
  int n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int64_t bytes() const { return n_panels() * (panel_bytes + (integer() ? int64_t{64} * n_groups : 0)); }
};

// codes [rows, cols]: trits in {-1, 0, 1}, or int8; scales [rows, n_groups]. Throws std::invalid_argument.
Linear repack_integer(Scheme scheme, const int8_t* codes, const float* scales, int rows, int cols, int n_groups);
// values [rows, cols] in f16, bf16 (two bytes) or f32 (four).
Linear repack_dense(Scheme scheme, const void* values, int rows, int cols);
// A matrix of zeros for repack.h to fill. Throws std::invalid_argument.
Linear empty_linear(Scheme scheme, int rows, int cols, int n_groups);
// Random trits or codes and scales near 1 / sqrt(cols), made in place: shapes for benchmarks without a file.
Linear random_linear(Scheme scheme, int rows, int cols, int n_groups, uint64_t seed);

// Row `row` as float32 [cols].
void dequantize_row(const Kernels& k, const Linear& w, int row, float* out);

}  // namespace bitnet
