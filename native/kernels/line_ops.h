// Lines: ternary matrices whose rows, or columns, lie one by one, so that those which count nothing are not read (kernels.h). Each
// instruction set brings add_trits (sum + codes * x by fours, codes up to 2), sum_part (of its lanes) and low_bytes, high_bytes, low_words, high_words: within
// every 16 bytes, elements of both vectors' first (last) halves in turn.
#pragma once
#include "integer_ops.h"
#include "low_rank_ops.h"

namespace {
typedef int32_t int32_alias __attribute__((may_alias));

struct TwoBitDigits {
  static constexpr int kDigits = 4;
  template <int s>
  BITNET_INLINE Words digit(const TwoBitDigits&, Words packed) { return (packed >> (2 * s)) & 0x0303; }
  BITNET_INLINE void all(const TwoBitDigits& d, Words packed, Words* out) {
    out[0] = digit<0>(d, packed), out[1] = digit<1>(d, packed), out[2] = digit<2>(d, packed), out[3] = digit<3>(d, packed);
  }
};
struct Base3Digits {
  static constexpr int kDigits = 5;
  BITNET_INLINE void all(const Base3Digits&, Words packed, Words* out) {
    Words even[5], odd[5];
    base3_digits(packed & 0xff, even), base3_digits(packed >> 8, odd);
    for (int s = 0; s < 5; s++) out[s] = even[s] | odd[s] << 8;
  }
  template <int s>
  BITNET_INLINE Words digit(const Base3Digits& d, Words packed) {
    Words out[5];
    all(d, packed, out);
    return out[s];
  }
};

// L lines at once, which share what is loaded of x.
template <class Digits, int L>
BITNET_INLINE void dot_some_lines(const Digits& digits, const uint8_t* lines, int64_t line_bytes, const int32_t* which, int ahead, const int8_t* x,
                                  int32_t* out) {
  constexpr int D = Digits::kDigits;
  const uint8_t *line[L], *later[L];
  for (int i = 0; i < L; i++) line[i] = lines + which[i] * line_bytes, later[i] = lines + which[i + ahead] * line_bytes;
  IntPart sums[L][D] = {};
  for (int64_t b = 0; b < line_bytes; b += 64, x += 64 * D) {
    for (int i = 0; i < L; i++) __builtin_prefetch(later[i] + b, 0, 2);
    for (int p = 0; p < 64; p += kPartBytes) {
      Words codes[L][D];
      for (int i = 0; i < L; i++) Digits::all(digits, load_words(line[i] + b + p), codes[i]);
      for (int s = 0; s < D; s++) {
        const Words xs = load_words(reinterpret_cast<const uint8_t*>(x + 64 * s + p));
        for (int i = 0; i < L; i++) sums[i][s] = add_trits(sums[i][s], codes[i][s], xs);
      }
    }
  }
  for (int i = 0; i < L; i++) {
    for (int s = 1; s < D; s++) sums[i][0] += sums[i][s];
    out[i] = sum_part(sums[i][0]);
  }
}
template <class Digits>
static void dot_lines(const uint8_t* lines, int64_t line_bytes, const int32_t* which, int n, int ahead, const int8_t* x, int32_t* out) {
  const Digits digits;
  int i = 0;
  for (; i + 2 <= n; i += 2) dot_some_lines<Digits, 2>(digits, lines, line_bytes, which + i, ahead, x, out + i);
  if (i < n) dot_some_lines<Digits, 1>(digits, lines, line_bytes, which + i, ahead, x, out + i);
}

// Four columns' bytes side by side: of every 16, words 4i .. 4i + 3 to out[i].
BITNET_INLINE void zip_columns(const uint8_t* const* columns, int64_t at, Words out[4]) {
  const Words a = load_words(columns[0] + at), b = load_words(columns[1] + at), c = load_words(columns[2] + at), d = load_words(columns[3] + at);
  const Words ab = low_bytes(a, b), cd = low_bytes(c, d), ab1 = high_bytes(a, b), cd1 = high_bytes(c, d);
  out[0] = low_words(ab, cd), out[1] = high_words(ab, cd), out[2] = low_words(ab1, cd1), out[3] = high_words(ab1, cd1);
}

template <class Digits>
static void add_lines(const uint8_t* lines, int64_t line_bytes, const int32_t* which, int n, int ahead, const int8_t* x, int32_t* sums) {
  constexpr int D = Digits::kDigits, kTogether = 32;  // whose bytes stay in L1 while sums of 64 D rows are in registers
  const Digits digits;
  const int n_vectors = (int)(line_bytes / 64);
  for (int first = 0; first < n; first += kTogether) {
    const int here = n - first < kTogether ? n - first : kTogether, quads = (here + 3) / 4;
    const uint8_t* columns[kTogether];
    alignas(4) int8_t q[kTogether];
    for (int i = 0; i < 4 * quads; i++) {
      const int32_t line = which[first + (i < here ? i : here - 1)];
      columns[i] = lines + line * line_bytes, q[i] = i < here ? x[line] : 0;
    }
    // As many lines of memory as are used are fetched with them, evenly: a burst would keep the products waiting.
    const uint8_t* later = lines + which[first + ahead] * line_bytes;
    int64_t fetched = 0, next = first + ahead;
    for (int v = 0; v < n_vectors; v++) {
      for (int p = 0; p < 64; p += kPartBytes) {
        int32_t* to = sums + 64 * D * v + p / 4;
        IntPart acc[4 * D] = {};
        for (int quad = 0; quad < quads; quad++) {
          for (int i = 0; p == 0 && i < 4; i++) {
            __builtin_prefetch(later + fetched, 0, 2);
            if ((fetched += 64) == line_bytes) later = lines + which[++next] * line_bytes, fetched = 0;
          }
          Words zipped[4];
          zip_columns(columns + 4 * quad, 64 * v + p, zipped);
          const Words xs = (Words)(IntPart{} + reinterpret_cast<const int32_alias*>(q)[quad]);
          for (int i = 0; i < 4; i++) {
            Words codes[D];
            Digits::all(digits, zipped[i], codes);
            for (int s = 0; s < D; s++) acc[4 * s + i] = add_trits(acc[4 * s + i], codes[s], xs);
          }
        }
        for (int j = 0; j < 4 * D; j++) *reinterpret_cast<IntPart*>(to + 16 * j) += acc[j];
      }
    }
  }
}

template <class Digits>
static void unpack_columns(const uint8_t* lines, int64_t line_bytes, int n, int digit, uint8_t* codes, int64_t panel_bytes) {
  const Digits digits;
  auto unpack = [&](auto which) __attribute__((always_inline)) {
    for (int c = 0; c < n; c += 4) {
      const uint8_t* columns[4];
      for (int i = 0; i < 4; i++) columns[i] = lines + (c + i < n ? c + i : n - 1) * line_bytes;
      for (int p = 0; p < 64; p += kPartBytes) {
        Words zipped[4];
        zip_columns(columns, p, zipped);
        for (int i = 0; i < 4; i++) store_words(codes + i * panel_bytes + 16 * c + p, Digits::template digit<decltype(which)::count>(digits, zipped[i]));
      }
    }
  };
  if (digit == 0) unpack(Count<0>());
  else if (digit == 1) unpack(Count<1>());
  else if (digit == 2) unpack(Count<2>());
  else if (digit == 3) unpack(Count<3>());
  else if constexpr (Digits::kDigits > 4) unpack(Count<4>());
}

// Which of n elements count, a bit each (kernels.h). The compiler turns the inner loop into vectors.
template <class Counts>
BITNET_INLINE void mark(int n, uint64_t* bits, Counts counts) {
  for (int first = 0; first < n; first += 64) {
    alignas(64) uint8_t flags[64] = {};
    if (n - first >= 64)
      for (int i = 0; i < 64; i++) flags[i] = counts(first + i);
    else
      for (int i = 0; i < n - first; i++) flags[i] = counts(first + i);
    uint64_t word = 0;
    for (int b = 0; b < 8; b++) {
      uint64_t eight;
      __builtin_memcpy(&eight, flags + 8 * b, 8);
      word |= (eight * 0x0102040810204080) >> 56 << 8 * b;  // byte i to bit i
    }
    bits[first / 64] = word;
  }
}
static void mark_gates(const float* gate, int n, uint64_t* bits) {
  mark(n, bits, [&](int i) __attribute__((always_inline)) {
    const float g = gate[i], y = g > 0 ? g : 0.0f;
    return y * y != 0;  // which it may be for the smallest of them
  });
}
static void mark_codes(const int8_t* q, int n, uint64_t* bits) {
  mark(n, bits, [&](int i) __attribute__((always_inline)) { return q[i] != 0; });
}
}  // namespace

#define BITNET_KERNELS(name, gemm_tokens, Base3Line, unpack_b3, gemm_ternary, gemm_i4, gemm_fp4, gemm_i8)                                \
  {                                                                                                                                  \
    name, gemm_tokens, multiply<TwoBit>, multiply<Base3>, multiply<Binary>, multiply<Int4>, multiply<Fp4>, multiply<Int8>,           \
        gemm_ternary, gemm_i4, gemm_fp4, gemm_i8, nullptr, nullptr, unpack_bits<2, as_they_are>, unpack_b3, unpack_bits<1, doubled>, \
        unpack_bits<4, as_they_are>, unpack_bits<4, fp4_codes>, add_runs, write_run, sum_i8, dot_lines<TwoBitDigits>,                \
        dot_lines<Base3Line>, add_lines<TwoBitDigits>, add_lines<Base3Line>, unpack_columns<TwoBitDigits>,                           \
        unpack_columns<Base3Line>, mark_gates, mark_codes, multiply_dense<DenseF16>,                                                 \
        multiply_dense<DenseBf16>, multiply_dense<DenseF32>, add_codes, add_codes, dot_codes, dot_codes, rms_norm, quantize,            \
        gate_with<silu>, gate_with<relu2>, gate_with<gelu_tanh>, add, rotate, hadamard, to_f16, from_f16, scores_f16, softmax, weigh_f16, split_weights, read_bytes     \
  }
