// Integer products, written once over 16 lanes and compiled once per instruction set, which brings its codecs: structs with
//   template <int T> static void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots)
// the sums of code * x of 16 rows for T tokens (1, 2, 3, 4 or 8), and fp4_codes, a table of 16 entries.
#pragma once
#include "float_ops.h"

namespace {
using bitnet::IntegerMatrix;
using bitnet::QuantizedRows;
using bitnet::Run;
using bitnet::kGemmRuns;

BITNET_INLINE v16 load_scales(const IntegerMatrix& w, int panel, int group) {
  const int64_t at = panel * w.panel_scales + 16 * group;
  return w.scales ? load(w.scales + at) : load_f16(w.half_scales + at);
}

// Not inlined: each number of tokens wants all registers for itself.
template <class Codec, int T>
static __attribute__((noinline)) void multiply_tokens(const IntegerMatrix& w, const QuantizedRows& x, int first, int end, int t0, float* y) {
  const bool apart = w.half_scales || 4 * w.panel_scales != w.panel_bytes;  // else the codecs' own prefetching brings the scales
  for (int panel = first; panel < end; panel++) {
    const uint8_t* codes = w.panels + panel * w.panel_bytes;
    const int64_t scales = (panel + 1) * w.panel_scales;  // the next panel's
    v16 sums[T];
    for (int t = 0; t < T; t++) sums[t] = splat(0.0f);
    for (int r = 0; r < x.n_runs; r++) {
      const Run& run = x.runs[r];
      const int64_t ahead = scales + 16 * run.weight_group;
      if (apart) __builtin_prefetch(w.scales ? (const void*)(w.scales + ahead) : (const void*)(w.half_scales + ahead), 0, 2);
      i16x dots[T];
      Codec::template dot<T>(codes + int64_t{64} * run.vector, run.n_vectors, x.q + t0 * x.stride + run.first, x.stride, dots);
      const v16 scale = load_scales(w, panel, run.weight_group);
      for (int t = 0; t < T; t++) {
        const i16x exact = dots[t] - w.bias * x.run_sums[int64_t{t0 + t} * x.n_runs + r];
        const v16 part = to_float(exact) * scale;
        sums[t] += x.grouped ? part * x.steps[int64_t{t0 + t} * x.n_steps + run.step_group] : part;
      }
    }
    const int rows = w.rows - 16 * panel;
    for (int t = 0; t < T; t++) {
      const v16 result = x.grouped ? sums[t] : sums[t] * x.steps[t0 + t];
      float* to = y + int64_t{t0 + t} * w.rows + 16 * panel;
      if (rows >= 16) store(to, result);
      else store_tail(to, rows, result);
    }
  }
}
template <class Codec>
static void multiply(const IntegerMatrix& w, const QuantizedRows& x, int panel, int n_panels, float* y) {
  const int end = panel + n_panels;
  if (x.n_tokens == 1) return multiply_tokens<Codec, 1>(w, x, panel, end, 0, y);
  if (x.n_tokens == 2) return multiply_tokens<Codec, 2>(w, x, panel, end, 0, y);
  if (x.n_tokens == 3) return multiply_tokens<Codec, 3>(w, x, panel, end, 0, y);
  if (x.n_tokens == 4) return multiply_tokens<Codec, 4>(w, x, panel, end, 0, y);
  if (x.n_tokens == 8) return multiply_tokens<Codec, 8>(w, x, panel, end, 0, y);
  for (int p = panel; p < end; p++) {  // a panel stays in the cache for all tokens
    int t = 0;
    for (; t + 8 <= x.n_tokens; t += 8) multiply_tokens<Codec, 8>(w, x, p, p + 1, t, y);
    for (; t + 4 <= x.n_tokens; t += 4) multiply_tokens<Codec, 4>(w, x, p, p + 1, t, y);
    for (; t + 2 <= x.n_tokens; t += 2) multiply_tokens<Codec, 2>(w, x, p, p + 1, t, y);
    for (; t < x.n_tokens; t++) multiply_tokens<Codec, 1>(w, x, p, p + 1, t, y);
  }
}

template <int R, bool Grouped>
BITNET_INLINE void add_some_runs(const IntegerMatrix& w, const QuantizedRows& x, int first, int panel, int t0, int n_tokens, const int32_t* dots,
                                 int64_t dots_stride, float* sums) {
  v16 scale[R];
  int step_group[R];
  for (int r = 0; r < R; r++) scale[r] = load_scales(w, panel, x.runs[first + r].weight_group), step_group[r] = x.runs[first + r].step_group;
  // Copied: for all that the compiler knows, what follows is changed by every store.
  const int64_t n_runs = x.n_runs, n_steps = x.n_steps, bias = w.bias;
  const int32_t* run_sums = x.run_sums + t0 * n_runs + first;
  const float* steps = x.steps + t0 * n_steps;
  for (int t = 0; t < n_tokens; t++, run_sums += n_runs, steps += n_steps) {
    v16 sum = load(sums + 16 * t);
    for (int r = 0; r < R; r++) {
      const i16x exact = load_int(dots + r * dots_stride + 16 * t) - (int32_t)bias * run_sums[r];
      const v16 part = to_float(exact) * scale[r];
      sum += Grouped ? part * steps[step_group[r]] : part;
    }
    store(sums + 16 * t, sum);
  }
}
static void add_runs(const IntegerMatrix& w, const QuantizedRows& x, int first, int n_runs, int panel, int t0, int n_tokens, const int32_t* dots,
                     int64_t dots_stride, float* sums) {
  auto add = [&](auto grouped) {
    constexpr bool kGrouped = decltype(grouped)::count;
    if (n_runs == kGemmRuns) return add_some_runs<kGemmRuns, kGrouped>(w, x, first, panel, t0, n_tokens, dots, dots_stride, sums);
    for (int r = 0; r < n_runs; r++) add_some_runs<1, kGrouped>(w, x, first + r, panel, t0, n_tokens, dots + r * dots_stride, dots_stride, sums);
  };
  if (x.grouped) add(Count<1>());
  else add(Count<0>());
}

static void write_run(const IntegerMatrix& w, const QuantizedRows& x, int panel, int n_panels, int t0, int n_tokens, const int32_t* dots, float* y) {
  v16 scale[2];
  for (int p = 0; p < n_panels; p++) scale[p] = load_scales(w, panel + p, 0);
  const int rows = w.rows - 16 * panel;
  for (int t = 0; t < n_tokens; t++) {
    const int32_t correction = w.bias * x.run_sums[t0 + t];
    const float step = x.steps[t0 + t];
    float* to = y + int64_t{t0 + t} * w.rows + 16 * panel;
    for (int p = 0; p < n_panels; p++) {
      const i16x exact = load_int(dots + (p * kGemmTokens + t) * 16) - correction;
      const v16 result = to_float(exact) * scale[p] * step;
      if (rows - 16 * p >= 16) store(to + 16 * p, result);
      else store_tail(to + 16 * p, rows - 16 * p, result);
    }
  }
}

typedef uint16_t Words __attribute__((vector_size(kPartBytes), aligned(1), may_alias));  // of codes, two to a word
BITNET_INLINE Words load_words(const uint8_t* p) { return *reinterpret_cast<const Words*>(p); }
BITNET_INLINE void store_words(uint8_t* p, Words x) { *reinterpret_cast<Words*>(p) = x; }
BITNET_INLINE Words as_they_are(Words bits) { return bits; }
BITNET_INLINE Words doubled(Words bits) { return bits + bits; }
BITNET_INLINE Words fp4_codes(Words numbers);  // kFp4Codes, byte by byte

// Tiles of Bits bits each: the code of bits s of a byte to tile s.
template <int Bits, Words (*code)(Words)>
static void unpack_bits(const uint8_t* panel, int64_t n_vectors, int64_t ahead, uint8_t* codes) {
  constexpr int kTiles = 8 / Bits;
  constexpr uint16_t kMask = ((1 << Bits) - 1) * 0x0101;
  for (int64_t v = 0; v < n_vectors; v++) {
    __builtin_prefetch(panel + 64 * v + ahead, 0, 2);
    for (int p = 0; p < 64; p += kPartBytes) {
      const Words packed = load_words(panel + 64 * v + p);
      for (int s = 0; s < kTiles; s++) store_words(codes + 64 * (kTiles * v + s) + p, code((packed >> (Bits * s)) & kMask));
    }
  }
}
// The five digits of the byte in each 16-bit lane; the divisions are exact for what can occur.
BITNET_INLINE void base3_digits(Words byte, Words digits[5]) {
  const Words low = byte & 63, w = (low * 57) >> 9, l = low - w * 9, h = (byte >> 6) * 7 + w;  // w = low / 9
  const Words ninths = (h * 57) >> 9, rest = h - ninths * 9;                                   // h / 9
  digits[1] = (l * 11) >> 5, digits[0] = l - digits[1] * 3;                                    // l / 3
  digits[4] = ninths, digits[3] = (rest * 11) >> 5, digits[2] = rest - digits[3] * 3;
}
[[maybe_unused]] static void unpack_b3(const uint8_t* panel, int64_t n_vectors, int64_t ahead, uint8_t* codes) {
  for (int64_t v = 0; v < n_vectors; v++) {
    __builtin_prefetch(panel + 64 * v + ahead, 0, 2);
    for (int p = 0; p < 64; p += kPartBytes) {
      const Words packed = load_words(panel + 64 * v + p);
      Words even[5], odd[5];
      base3_digits(packed & 0xff, even), base3_digits(packed >> 8, odd);
      for (int s = 0; s < 5; s++) store_words(codes + 64 * (5 * v + s) + p, even[s] | odd[s] << 8);
    }
  }
}
// A codec of Tiles tiles a vector, unpacked piece by piece for one of one tile: base-3 where no table of bytes can be looked up.
template <void (*unpack)(const uint8_t*, int64_t, int64_t, uint8_t*), int Tiles, class Tile>
struct Unpacked {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int kVectors = 8;
    alignas(64) uint8_t tiles[kVectors * Tiles * 64];
    for (int t = 0; t < T; t++) dots[t] = splat_int(0);
    for (int64_t v = 0; v < n_vectors; v += kVectors) {
      const int64_t n = n_vectors - v < kVectors ? n_vectors - v : kVectors;
      unpack(codes + 64 * v, n, 4096, tiles);
      i16x part[T];
      Tile::template dot<T>(tiles, Tiles * n, x + 4 * Tiles * v, x_stride, part);
      for (int t = 0; t < T; t++) dots[t] += part[t];
    }
  }
};

template <class Tile>
using UnpackedBase3 = Unpacked<unpack_b3, 5, Tile>;
template <class Tile>
using UnpackedBinary = Unpacked<unpack_bits<1, doubled>, 8, Tile>;

static int32_t sum_i8(const int8_t* q, int n) {
  i16x sums = splat_int(0);
  int i = 0;
  for (; i + 16 <= n; i += 16) sums += widen_int(q + i);
  int32_t sum = 0;
  for (int l = 0; l < 16; l++) sum += sums[l];
  for (; i < n; i++) sum += q[i];
  return sum;
}
}  // namespace
