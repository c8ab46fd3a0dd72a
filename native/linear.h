// Weight matrices as they lie in memory, and how they get there.
#pragma once
#include <cstdint>

#include "buffer.h"
#include "kernels/kernels.h"

namespace bitnet {

// ternary and ternary_base3 hold the same weights, in 2 and in 1.6 bits.
enum class Scheme { ternary, ternary_base3, binary, int4, fp4, int8, f16, bf16, f32 };

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// How the codes of a scheme lie in a vector of 64 bytes (kernels.h).
struct CodeLayout {
  int tiles;  // of 4 inputs, per vector
  int bits;   // tile s lies in bits s * bits and up; 0 for base-3, whose bytes kernels.h explains
  int bias;   // code = weight + bias
  int top;    // largest code
  const char* weights;  // in words
  int inputs() const { return 4 * tiles; }
};
inline CodeLayout layout(Scheme s) {
  if (s == Scheme::ternary) return {4, 2, 1, 2, "-1, 0, +1"};
  if (s == Scheme::ternary_base3) return {5, 0, 1, 2, "-1, 0, +1"};
  if (s == Scheme::binary) return {8, 1, 1, 2, "-1, +1"};
  if (s == Scheme::int4) return {2, 4, 8, 15, "-8 to 7"};
  if (s == Scheme::fp4) return {2, 4, 12, 24, "0, 1, 2, 3, 4, 6, 8, 12 and their negatives"};
  return {1, 8, 128, 255, "-128 to 127"};
}
// The bits in which a code lies: itself, half of a binary one, an E2M1 number for fp4. -1 for a code that the scheme has not.
inline int bits_of_code(Scheme s, unsigned code) {
  if (code > unsigned(layout(s).top)) return -1;
  if (s == Scheme::binary) return code & 1 ? -1 : int(code / 2);
  if (s != Scheme::fp4) return int(code);
  for (int i = 0; i < 16; i++)
    if (kFp4Codes[i] == code) return i;
  return -1;
}
inline int code_of_bits(Scheme s, int bits) { return s == Scheme::binary ? 2 * bits : s == Scheme::fp4 ? kFp4Codes[bits] : bits; }

// In panels of 16 rows; or, of ternary weights, in rows or columns one by one (kernels.h, lines), for zero_skip.h.
enum class Lie { panels, rows, columns };

struct Linear {
  Scheme scheme = Scheme::f32;
  Lie lie = Lie::panels;
  int rows = 0, cols = 0;        // outputs, inputs
  int padded_cols = 0;           // dense: a multiple of 4; integer: as many inputs as all vectors of all groups hold, less those between groups
  int group = 0;                 // inputs that share a scale: a multiple of 16, or cols
  int n_groups = 0, group_vectors = 0;  // vectors per group
  int64_t code_bytes = 0, panel_bytes = 0;  // of a panel: without its scales, and with them
  Buffer<uint8_t> panels;        // [ceil(rows/16), panel_bytes]: values, or codes and then room for scales; or [n_lines, line_bytes]
  enum class Scales { apart, one, in_panels, apart_f16 } scales_lie = Scales::apart;  // where compact_scales put them
  Buffer<float> scales;          // [ceil(rows/16), n_groups, 16], integer schemes only; [16] if there is one, the same for all rows
  Buffer<uint16_t> half_scales;  // instead, if there are several groups and every scale is one of f16
  Buffer<float> bias;            // [rows], added to the product; usually empty

  bool integer() const { return scheme < Scheme::f16; }
  bool ternary() const { return scheme == Scheme::ternary || scheme == Scheme::ternary_base3; }
  int n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int n_lines() const { return lie == Lie::rows ? rows : cols; }
  // Of a row, or of a column.
  int64_t line_bytes(Lie of) const { const int digits = layout(scheme).tiles; return int64_t{64} * (((of == Lie::rows ? cols : rows) + 64 * digits - 1) / (64 * digits)); }
  int64_t line_bytes() const { return line_bytes(lie); }
  int64_t laid_bytes() const { return lie == Lie::panels ? n_panels() * panel_bytes : n_lines() * line_bytes(); }
  int64_t bytes() const { return laid_bytes() + int64_t(scales.size()) * 4 + int64_t(half_scales.size()) * 2; }
  IntegerMatrix view() const {
    IntegerMatrix w{panels.data(), panel_bytes, nullptr, nullptr, int64_t{kPanelRows} * n_groups, rows, layout(scheme).bias};
    if (scales_lie == Scales::apart_f16) w.half_scales = half_scales.data();
    else w.scales = scales.data();
    if (scales_lie == Scales::one) w.panel_scales = 0;
    if (scales_lie == Scales::in_panels) w.scales = reinterpret_cast<const float*>(panels.data() + code_bytes), w.panel_scales = panel_bytes / 4;
    return w;
  }
};

// arena: whose memory the panels take; null for their own.
// codes [rows, cols], those of the scheme's layout; scales [rows, n_groups]. Throws std::invalid_argument.
Linear repack_integer(Scheme scheme, const int8_t* codes, const float* scales, int rows, int cols, int n_groups);
// values [rows, cols] in f16, bf16 (two bytes) or f32 (four).
Linear repack_dense(Scheme scheme, const void* values, int rows, int cols, Arena* arena = nullptr);
// A matrix of zeros for repack.h to fill. may_lie: how else it may come to lie later, for which there must be room. Throws std::invalid_argument.
Linear empty_linear(Scheme scheme, int rows, int cols, int n_groups, Arena* arena = nullptr, Lie may_lie = Lie::panels);
// To be called when all scales are there. One for all rows is kept once; one a row moves behind the codes of its panel, if that has room;
// several a row take half the memory wherever f16 holds them exactly. What lies apart moves into the arena, if there is one.
void compact_scales(Linear& w, Arena* arena);
// Random trits or codes and scales near 1 / sqrt(cols), made in place: shapes for benchmarks without a file.
Linear random_linear(const Kernels& k, Scheme scheme, int rows, int cols, int n_groups, uint64_t seed, Arena* arena = nullptr, Lie may_lie = Lie::panels);

// Row `row` as float32 [cols].
void dequantize_row(const Kernels& k, const Linear& w, int row, float* out);

}  // namespace bitnet
