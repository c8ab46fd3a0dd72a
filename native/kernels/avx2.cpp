// AVX2, FMA and F16C: most x86 machines since 2013.
#include <immintrin.h>

#include "kernels.h"

namespace {
constexpr int kLanes = 8;

}
#include "lanes.h"

namespace {
BITNET_INLINE v16 load_f16(const uint16_t* p) {
  return {{(FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))}};
}
BITNET_INLINE void store_f16(v16 v, uint16_t* p) {
  for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)(p + 8 * i), _mm256_cvtps_ph((__m256)v.part[i], _MM_FROUND_TO_NEAREST_INT));
}
BITNET_INLINE v16 fma16(v16 a, v16 b, v16 c) {
  return for_parts<v16>([&](int i) __attribute__((always_inline)) {
    return (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
  });
}
BITNET_INLINE void store_bytes(int8_t* to, i16x x) {  // of -128..127
  const __m256i pairs = _mm256_packs_epi32((__m256i)x.part[0], (__m256i)x.part[1]);  // 0-3, 8-11, 4-7, 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
constexpr int kSums = 6;  // of two registers each

typedef int32_t four __attribute__((may_alias, aligned(1)));
static inline __m256i broadcast4(const int8_t* x) { return _mm256_set1_epi32(*(const four*)x); }

}  // namespace

#include "integer_ops.h"

namespace {
BITNET_INLINE IntPart add_trits(IntPart sum, Words codes, Words x) {
#ifdef __AVXVNNI__
  return (IntPart)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#else
  return sum + (IntPart)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)x), _mm256_set1_epi16(1));
#endif
}
BITNET_INLINE i16x add_pairs(i16x sum, i16x a, i16x b) {
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) { return sum.part[p] + (IntPart)_mm256_madd_epi16((__m256i)a.part[p], (__m256i)b.part[p]); });
}
BITNET_INLINE int32_t sum_part(IntPart x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
BITNET_INLINE Words low_bytes(Words a, Words b) { return (Words)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
BITNET_INLINE Words high_bytes(Words a, Words b) { return (Words)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
BITNET_INLINE Words low_words(Words a, Words b) { return (Words)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
BITNET_INLINE Words high_words(Words a, Words b) { return (Words)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
}  // namespace

#include "line_ops.h"

namespace {
static inline __m256i and_shifted(__m256i packed, int by, int mask) { return _mm256_and_si256(_mm256_srli_epi16(packed, by), _mm256_set1_epi8((char)mask)); }
static inline __m256i table(const uint8_t entries[16], __m256i indices) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)entries)), indices);
}
BITNET_INLINE Words fp4_codes(Words numbers) { return (Words)table(bitnet::kFp4Codes, (__m256i)numbers); }

// sums += codes * x, N tiles of codes up to Top, x of one token, in as many sums as `chains` says for T tokens and N tiles.
#ifdef __AVXVNNI__
constexpr int chains(int T, int N) { return T * N <= 4 ? N : T <= 4 ? 4 / T : 1; }
template <int Top, int N, int Chains>
static inline void add_products(__m256i (&sums)[Chains], const __m256i (&codes)[N], const int8_t* x) {
  for (int s = 0; s < N; s++) sums[s % Chains] = _mm256_dpbusd_avx_epi32(sums[s % Chains], codes[s], broadcast4(x + 4 * s));
}
#else
constexpr int chains(int, int) { return 1; }
// Sums of neighbours' products, in 16 bits: a pair is at most 2 * code * 128.
static inline __m256i pairs(__m256i codes, const int8_t* x) { return _mm256_maddubs_epi16(codes, broadcast4(x)); }
static inline __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

template <int Top, int N>
static inline void add_products(__m256i (&sums)[1], const __m256i (&codes)[N], const int8_t* x) {
  if constexpr (Top == 255) {  // a pair does not fit into 16 bits: the code's halves apart, each up to 15
    for (int s = 0; s < N; s++) {
      const __m256i low = pairs(and_shifted(codes[s], 0, 15), x + 4 * s), high = pairs(and_shifted(codes[s], 4, 15), x + 4 * s);
      sums[0] = _mm256_add_epi32(sums[0], _mm256_add_epi32(widen(low), _mm256_slli_epi32(widen(high), 4)));
    }
  } else {
    static_assert(N * 2 * Top * 128 < 1 << 15);
    __m256i all = pairs(codes[0], x);
    for (int s = 1; s < N; s++) all = _mm256_add_epi16(all, pairs(codes[s], x + 4 * s));
    sums[0] = _mm256_add_epi32(sums[0], widen(all));
  }
}
#endif

// One half (8 rows) of a vector, unpacked once for all tokens: N tiles of codes up to kTop.
struct TwoBitHalf {
  static constexpr int kTop = 2;
  __m256i codes[4];
  explicit TwoBitHalf(__m256i packed) {
    for (int s = 0; s < 4; s++) codes[s] = and_shifted(packed, 2 * s, 3);
  }
};
struct BinaryHalf {
  static constexpr int kTop = 2;
  __m256i codes[8];
  explicit BinaryHalf(__m256i packed) {
    codes[0] = _mm256_and_si256(_mm256_add_epi8(packed, packed), _mm256_set1_epi8(2));
    for (int s = 1; s < 8; s++) codes[s] = and_shifted(packed, s - 1, 2);
  }
};
struct Int4Half {
  static constexpr int kTop = 15;
  __m256i codes[2];
  explicit Int4Half(__m256i packed) {
    for (int s = 0; s < 2; s++) codes[s] = and_shifted(packed, 4 * s, 15);
  }
};
struct Fp4Half {
  static constexpr int kTop = 24;
  __m256i codes[2];
  explicit Fp4Half(__m256i packed) {
    for (int s = 0; s < 2; s++) codes[s] = table(bitnet::kFp4Codes, and_shifted(packed, 4 * s, 15));
  }
};
template <int Top>
struct TileHalf {
  static constexpr int kTop = Top;
  __m256i codes[1];
  explicit TileHalf(__m256i unpacked) : codes{unpacked} {}
};
template <class Half>
struct Halves {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int kTiles = sizeof Half::codes / 32, kChains = chains(T, kTiles);
    for (int half = 0; half < 2; half++) {
      __m256i acc[T][kChains];
      for (int t = 0; t < T; t++)
        for (int c = 0; c < kChains; c++) acc[t][c] = _mm256_setzero_si256();
      for (int64_t v = 0; v < n_vectors; v++) {
        const uint8_t* at = codes + 64 * v + 32 * half;
        if (half == 0) prefetch(at);
        const Half weights(_mm256_loadu_si256((const __m256i*)at));
        for (int t = 0; t < T; t++) add_products<Half::kTop>(acc[t], weights.codes, x + t * x_stride + 4 * kTiles * v);
      }
      for (int t = 0; t < T; t++) {
        for (int c = 1; c < kChains; c++) acc[t][0] = _mm256_add_epi32(acc[t][0], acc[t][c]);
        _mm256_storeu_si256((__m256i*)(dots + t) + half, acc[t][0]);
      }
    }
  }
};
using TwoBit = Halves<TwoBitHalf>;
using Binary = Halves<BinaryHalf>;
using Int4 = Halves<Int4Half>;
using Fp4 = Halves<Fp4Half>;
using Int8 = Halves<TileHalf<255>>;
using Base3 = UnpackedBase3<Halves<TileHalf<2>>>;

#ifdef __AVXVNNI__
// T tokens x 16 rows.
template <int T>
static inline void gemm_block(const uint8_t* codes, int64_t inputs, const int8_t* x, int64_t x_stride, bool first, int32_t* out) {
  __m256i acc[T][2];
  for (int t = 0; t < T; t++)
    for (int h = 0; h < 2; h++) acc[t][h] = first ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i*)(out + 16 * t) + h);
  for (int64_t k = 0; k < inputs; k += 4) {
    const __m256i* c = (const __m256i*)(codes + 16 * k);
    const __m256i low = _mm256_loadu_si256(c), high = _mm256_loadu_si256(c + 1);
    for (int t = 0; t < T; t++) {
      const __m256i xt = broadcast4(x + t * x_stride + k);
      acc[t][0] = _mm256_dpbusd_avx_epi32(acc[t][0], low, xt), acc[t][1] = _mm256_dpbusd_avx_epi32(acc[t][1], high, xt);
    }
  }
  for (int t = 0; t < T; t++)
    for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i*)(out + 16 * t) + h, acc[t][h]);
}
static void gemm(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens,
                 bool first, bool, int32_t* out) {
  for (int p = 0; p < n_panels; p++, codes += panel_bytes, out += kGemmTokens * 16) {
    int t = 0;
    for (; t + 6 <= n_tokens; t += 6) gemm_block<6>(codes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
    for (; t + 2 <= n_tokens; t += 2) gemm_block<2>(codes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
    for (; t < n_tokens; t++) gemm_block<1>(codes, inputs, x + t * x_stride, x_stride, first, out + 16 * t);
  }
}
#else
// T tokens x 8 rows in 16-bit sums, widened every Steps steps of 4 inputs: Steps * 2 * code * 128 < 2^15.
template <int T, int Steps>
static inline void gemm_block(const uint8_t* codes, int64_t inputs, const int8_t* x, int64_t x_stride, bool first, int32_t* out) {
  for (int64_t k0 = 0; k0 < inputs; k0 += 4 * Steps) {
    const int64_t end = k0 + 4 * Steps < inputs ? k0 + 4 * Steps : inputs;
    __m256i acc[T];
    for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_si256();
    for (int64_t k = k0; k < end; k += 4) {
      const __m256i c = _mm256_loadu_si256((const __m256i*)(codes + 16 * k));
      for (int t = 0; t < T; t++) acc[t] = _mm256_add_epi16(acc[t], pairs(c, x + t * x_stride + k));
    }
    for (int t = 0; t < T; t++) {
      __m256i* to = (__m256i*)(out + 16 * t);
      const __m256i before = first && k0 == 0 ? _mm256_setzero_si256() : _mm256_loadu_si256(to);
      _mm256_storeu_si256(to, _mm256_add_epi32(before, widen(acc[t])));
    }
  }
}
template <int Steps>
static void gemm(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens,
                 bool first, bool, int32_t* out) {
  for (int half = 0; half < 2 * n_panels; half++) {
    const uint8_t* from = codes + half / 2 * panel_bytes + 32 * (half % 2);
    int32_t* to = out + half / 2 * kGemmTokens * 16 + 8 * (half % 2);
    int t = 0;
    for (; t + 8 <= n_tokens; t += 8) gemm_block<8, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
    for (; t + 4 <= n_tokens; t += 4) gemm_block<4, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
    for (; t < n_tokens; t++) gemm_block<1, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
  }
}
constexpr bitnet::GemmInteger no_gemm = nullptr;  // many tokens go through multiply_i8 in blocks
#endif
constexpr int kNever = 1 << 30;  // multiply_* is as fast as gemm or faster for any number of tokens (docs/log.md); gemm is for lines
}  // namespace

namespace bitnet {
#ifdef __AVXVNNI__
const Kernels kAvxVnni = BITNET_KERNELS("avxvnni", kNever, Base3Digits, unpack_b3, gemm, gemm, gemm, gemm);
#else
const Kernels kAvx2 = BITNET_KERNELS("avx2", kNever, Base3Digits, unpack_b3, gemm<60>, gemm<8>, gemm<5>, no_gemm);
#endif
}
