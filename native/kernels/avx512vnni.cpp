// AVX-512 with VNNI: one instruction multiplies 64 codes (unsigned) by 64 activations (signed) and adds them by fours.
#include <immintrin.h>

#include "kernels.h"

namespace {
constexpr int kLanes = 16;

}
#include "lanes.h"

namespace {
BITNET_INLINE v16 load_f16(const uint16_t* p) { return {{(FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}}; }
BITNET_INLINE void store_f16(v16 x, uint16_t* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT));
}
BITNET_INLINE v16 fma16(v16 a, v16 b, v16 c) { return {{(FloatPart)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}}; }
BITNET_INLINE void store_bytes(int8_t* to, i16x x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x.part[0])); }
BITNET_INLINE i16x dots_of(__m512i sums) { return {{(IntPart)sums}}; }
constexpr int kSums = 24;

typedef int32_t four __attribute__((may_alias, aligned(1)));
static inline __m512i broadcast4(const int8_t* x) { return _mm512_set1_epi32(*(const four*)x); }

// sum += codes * x, by fours. In assembly where that is possible: gcc 12 keeps the broadcast apart and copies every sum, which costs
// base-3 a quarter of its speed. Not under sanitizers, which could not see what it reads.
static inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, const int8_t* x) {
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const four*)x));
#else
  sum = _mm512_dpbusd_epi32(sum, codes, broadcast4(x));
#endif
}

// Sums of T tokens in N chains each, so that no chain waits for its own last sum.
template <int T, int N>
struct Sums {
  __m512i chain[T][N];
  Sums() {
    for (int t = 0; t < T; t++)
      for (int n = 0; n < N; n++) chain[t][n] = _mm512_setzero_si512();
  }
  void add(int n, __m512i codes, const int8_t* x, int64_t x_stride) {
    for (int t = 0; t < T; t++) add_products(chain[t][n], codes, x + t * x_stride);
  }
};
}  // namespace

#include "integer_ops.h"

namespace {
BITNET_INLINE IntPart add_trits(IntPart sum, Words codes, Words x) { return (IntPart)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x); }
BITNET_INLINE i16x add_pairs(i16x sum, i16x a, i16x b) {
  return {{(IntPart)_mm512_dpwssd_epi32((__m512i)sum.part[0], (__m512i)a.part[0], (__m512i)b.part[0])}};
}
BITNET_INLINE int32_t sum_part(IntPart x) { return _mm512_reduce_add_epi32((__m512i)x); }
BITNET_INLINE Words low_bytes(Words a, Words b) { return (Words)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
BITNET_INLINE Words high_bytes(Words a, Words b) { return (Words)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
BITNET_INLINE Words low_words(Words a, Words b) { return (Words)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
BITNET_INLINE Words high_words(Words a, Words b) { return (Words)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
}  // namespace

#include "line_ops.h"

namespace {
// Up to four tokens: the codes stay where they are in their bytes, and the factors 1, 4, 16, 64 leave with the sums.
struct TwoBit {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    if constexpr (T <= 4) {
      const __m512i m0 = _mm512_set1_epi8(0x03), m1 = _mm512_set1_epi8(0x0c), m2 = _mm512_set1_epi8(0x30), m3 = _mm512_set1_epi8((char)0xc0);
      constexpr int U = T <= 2 ? 2 : 1;  // vectors at a time, so that no chain waits for its last sum
      Sums<T, 4 * U> sums;
      auto add = [&](int u) __attribute__((always_inline)) {
        prefetch(codes);
        const __m512i packed = _mm512_loadu_si512(codes);
        sums.add(4 * u, _mm512_and_si512(packed, m0), x, x_stride);
        sums.add(4 * u + 1, _mm512_and_si512(packed, m1), x + 4, x_stride);
        sums.add(4 * u + 2, _mm512_and_si512(packed, m2), x + 8, x_stride);
        sums.add(4 * u + 3, _mm512_and_si512(packed, m3), x + 12, x_stride);
        codes += 64, x += 16;
      };
      int64_t v = 0;
      for (; v + U <= n_vectors; v += U)
        for (int u = 0; u < U; u++) add(u);
      for (; v < n_vectors; v++) add(0);
      for (int t = 0; t < T; t++) {
        __m512i* c = sums.chain[t];
        for (int n = 4; n < 4 * U; n++) c[n - 4] = _mm512_add_epi32(c[n - 4], c[n]);
        dots[t] = dots_of(_mm512_add_epi32(_mm512_add_epi32(c[0], _mm512_srai_epi32(c[1], 2)), _mm512_add_epi32(_mm512_srai_epi32(c[2], 4), _mm512_srai_epi32(c[3], 6))));
      }
    } else {
      const __m512i three = _mm512_set1_epi8(3);
      Sums<T, 1> sums;
      for (int64_t v = 0; v < n_vectors; v++, codes += 64, x += 16) {
        prefetch(codes);
        const __m512i packed = _mm512_loadu_si512(codes);
        sums.add(0, _mm512_and_si512(packed, three), x, x_stride);
        sums.add(0, _mm512_and_si512(_mm512_srli_epi16(packed, 2), three), x + 4, x_stride);
        sums.add(0, _mm512_and_si512(_mm512_srli_epi16(packed, 4), three), x + 8, x_stride);
        sums.add(0, _mm512_and_si512(_mm512_srli_epi16(packed, 6), three), x + 12, x_stride);
      }
      for (int t = 0; t < T; t++) dots[t] = dots_of(sums.chain[t][0]);
    }
  }
};

// As two-bit codes, with factors 1 to 128 and codes of 0 or 1; doubled at the end.
struct Binary {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int N = T <= 2 ? 8 : 1;
    Sums<T, N> sums;
    for (int64_t v = 0; v < n_vectors; v++, codes += 64, x += 32) {
      prefetch(codes);
      const __m512i packed = _mm512_loadu_si512(codes);
      for (int s = 0; s < 8; s++)
        if constexpr (N == 8) sums.add(s, _mm512_and_si512(packed, _mm512_set1_epi8((char)(1 << s))), x + 4 * s, x_stride);
        else sums.add(0, _mm512_and_si512(_mm512_srli_epi16(packed, s), _mm512_set1_epi8(1)), x + 4 * s, x_stride);
    }
    for (int t = 0; t < T; t++) {
      const __m512i* c = sums.chain[t];
      __m512i sum = _mm512_add_epi32(c[0], c[0]);
      for (int s = 1; s < N; s++) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(c[s], s - 1));
      dots[t] = dots_of(sum);
    }
  }
};

struct Int4 {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    Sums<T, 2> sums;
    for (int64_t v = 0; v < n_vectors; v++, codes += 64, x += 8) {
      prefetch(codes);
      const __m512i packed = _mm512_loadu_si512(codes);
      sums.add(0, _mm512_and_si512(packed, low), x, x_stride);
      sums.add(1, _mm512_and_si512(packed, high), x + 4, x_stride);
    }
    for (int t = 0; t < T; t++) dots[t] = dots_of(_mm512_add_epi32(sums.chain[t][0], _mm512_srai_epi32(sums.chain[t][1], 4)));
  }
};

static inline __m512i fp4_table() { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)bitnet::kFp4Codes)); }
BITNET_INLINE Words fp4_codes(Words numbers) { return (Words)_mm512_shuffle_epi8(fp4_table(), (__m512i)numbers); }

struct Fp4 {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    const __m512i low = _mm512_set1_epi8(15), table = fp4_table();
    Sums<T, 2> sums;
    for (int64_t v = 0; v < n_vectors; v++, codes += 64, x += 8) {
      prefetch(codes);
      const __m512i packed = _mm512_loadu_si512(codes);
      sums.add(0, _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low)), x, x_stride);
      sums.add(1, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low)), x + 4, x_stride);
    }
    for (int t = 0; t < T; t++) dots[t] = dots_of(_mm512_add_epi32(sums.chain[t][0], sums.chain[t][1]));
  }
};

struct Int8 {  // also codes of any kind, unpacked
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int N = T == 1 ? 4 : T <= 4 ? 2 : 1;
    Sums<T, N> sums;
    int64_t v = 0;
    for (; v + 4 <= n_vectors; v += 4, codes += 256, x += 16)
      for (int s = 0; s < 4; s++) {
        prefetch(codes + 64 * s);
        sums.add(s % N, _mm512_loadu_si512(codes + 64 * s), x + 4 * s, x_stride);
      }
    for (; v < n_vectors; v++, codes += 64, x += 4) sums.add(0, _mm512_loadu_si512(codes), x, x_stride);
    for (int t = 0; t < T; t++) {
      __m512i sum = sums.chain[t][0];
      for (int n = 1; n < N; n++) sum = _mm512_add_epi32(sum, sums.chain[t][n]);
      dots[t] = dots_of(sum);
    }
  }
};
#ifdef __AVX512VBMI__
// Base-3 by byte permutations, which are tables of 64 entries indexed by the low six bits: those of a byte as it is give its first two
// digits; for the other three they give (h % 7) << 2, which the upper two bits complete.
struct DigitTables {
  alignas(64) uint8_t first[2][64], h_mod_7[64], last[3][64];
};
constexpr DigitTables make_digit_tables() {
  DigitTables t = {};
  for (int r = 0; r < 63; r++) t.first[0][r] = (uint8_t)(r % 9 % 3), t.first[1][r] = (uint8_t)(r % 9 / 3), t.h_mod_7[r] = (uint8_t)(r / 9 << 2);
  for (int h = 0; h < 27; h++) {
    const int i = (h % 7) << 2 | h / 7;
    t.last[0][i] = (uint8_t)(h % 3), t.last[1][i] = (uint8_t)(h / 3 % 3), t.last[2][i] = (uint8_t)(h / 9);
  }
  return t;
}
constexpr DigitTables kDigitTables = make_digit_tables();
struct Digits {
  __m512i first[2], h_mod_7, last[3];
  Digits() {
    for (int s = 0; s < 2; s++) first[s] = _mm512_load_si512(kDigitTables.first[s]);
    h_mod_7 = _mm512_load_si512(kDigitTables.h_mod_7);
    for (int s = 0; s < 3; s++) last[s] = _mm512_load_si512(kDigitTables.last[s]);
  }
  __m512i high(__m512i packed) const {  // (packed >> 6 & 3) | h % 7 << 2, in every byte
    return _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 6), _mm512_set1_epi8(3), _mm512_permutexvar_epi8(packed, h_mod_7), 0xea);
  }
  __m512i operator()(int s, __m512i packed, __m512i high) const {
    return s < 2 ? _mm512_permutexvar_epi8(packed, first[s]) : _mm512_permutexvar_epi8(high, last[s - 2]);
  }
};

struct Base3 {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int N = T <= 4 ? 5 : 2;  // one chain a token would wait five times a vector for its own last sum
    const Digits digits;
    __m512i sums[T][N];
    for (int t = 0; t < T; t++)
      for (int n = 0; n < N; n++) sums[t][n] = _mm512_setzero_si512();
    for (int64_t v = 0; v < n_vectors; v++, codes += 64, x += 20) {
      prefetch(codes, bitnet::kFetchAhead.base3_into_l2);
      const __m512i packed = _mm512_loadu_si512(codes), high = digits.high(packed);
      for (int s = 0; s < 5; s++) {
        const __m512i tile = digits(s, packed, high);
        for (int t = 0; t < T; t++) add_products(sums[t][s % N], tile, x + t * x_stride + 4 * s);
      }
    }
    for (int t = 0; t < T; t++) {
      __m512i sum = sums[t][0];
      for (int n = 1; n < N; n++) sum = _mm512_add_epi32(sum, sums[t][n]);
      dots[t] = dots_of(sum);
    }
  }
};
struct TableDigits {
  static constexpr int kDigits = 5;
  Digits tables;
  BITNET_INLINE void all(const TableDigits& d, Words packed, Words* out) {
    const __m512i high = d.tables.high((__m512i)packed);
    for (int s = 0; s < 5; s++) out[s] = (Words)d.tables(s, (__m512i)packed, high);
  }
  template <int s>
  BITNET_INLINE Words digit(const TableDigits& d, Words packed) {
    return (Words)d.tables(s, (__m512i)packed, d.tables.high((__m512i)packed));
  }
};
static void unpack_b3_by_tables(const uint8_t* panel, int64_t n_vectors, int64_t ahead, uint8_t* codes) {
  const Digits digits;
  for (int64_t v = 0; v < n_vectors; v++) {
    __builtin_prefetch(panel + 64 * v + ahead, 0, 2);
    const __m512i packed = _mm512_loadu_si512(panel + 64 * v), high = digits.high(packed);
    for (int s = 0; s < 5; s++) _mm512_storeu_si512(codes + 320 * v + 64 * s, digits(s, packed, high));
  }
}
#else
using Base3 = UnpackedBase3<Int8>;
#endif

// P panels x T tokens in registers: each vector of codes meets T broadcasts of four activations.
template <int P, int T>
static inline void gemm_block(const uint8_t* codes, int64_t panel_bytes, int64_t inputs, const int8_t* x, int64_t x_stride, bool first, int32_t* out) {
  __m512i acc[P][T];
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++) acc[p][t] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(out + (p * kGemmTokens + t) * 16);
  for (int64_t k = 0; k < inputs; k += 4) {
    __m512i w[P];
    for (int p = 0; p < P; p++) w[p] = _mm512_loadu_si512(codes + p * panel_bytes + 16 * k);
    for (int t = 0; t < T; t++) {
      const __m512i xt = broadcast4(x + t * x_stride + k);
      for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], w[p], xt);
    }
  }
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++) _mm512_storeu_si512(out + (p * kGemmTokens + t) * 16, acc[p][t]);
}
template <int P>
static void gemm_panels(const uint8_t* codes, int64_t panel_bytes, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens, bool first,
                        int32_t* out) {
  int t = 0;
  for (; t + 12 <= n_tokens; t += 12) gemm_block<P, 12>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
  for (; t + 4 <= n_tokens; t += 4) gemm_block<P, 4>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
  for (; t < n_tokens; t++) gemm_block<P, 1>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
}
static void gemm(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens,
                 bool first, bool, int32_t* out) {
  if (n_panels == 2) gemm_panels<2>(codes, panel_bytes, inputs, x, x_stride, n_tokens, first, out);
  else gemm_panels<1>(codes, panel_bytes, inputs, x, x_stride, n_tokens, first, out);
}
}  // namespace

namespace bitnet {
#ifdef __AVX512VBMI__
const Kernels kAvx512Vbmi = BITNET_KERNELS("avx512vbmi", 9, TableDigits, unpack_b3_by_tables, gemm, gemm, gemm, gemm);
#else
const Kernels kAvx512Vnni = BITNET_KERNELS("avx512vnni", 9, Base3Digits, unpack_b3, gemm, gemm, gemm, gemm);
#endif
}
