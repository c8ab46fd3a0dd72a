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
static inline __m256i and_shifted(__m256i packed, int by, int mask) { return _mm256_and_si256(_mm256_srli_epi16(packed, by), _mm256_set1_epi8((char)mask)); }
// Sums of neighbours' products, in 16 bits: a pair is at most 2 * code * 128.
static inline __m256i pairs(__m256i codes, const int8_t* x) { return _mm256_maddubs_epi16(codes, broadcast4(x)); }
static inline __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// One half (8 rows) of a vector of codes, unpacked once and multiplied by the activations of one token after another.
struct TwoBitHalf {
  static constexpr int kInputs = 16;
  __m256i c[4];
  explicit TwoBitHalf(const uint8_t* at) {
    const __m256i packed = _mm256_loadu_si256((const __m256i*)at);
    for (int s = 0; s < 4; s++) c[s] = and_shifted(packed, 2 * s, 3);
  }
  __m256i products(const int8_t* x) const {  // four pairs of at most 2 * 2 * 128 in 16 bits
    return widen(_mm256_add_epi16(_mm256_add_epi16(pairs(c[0], x), pairs(c[1], x + 4)), _mm256_add_epi16(pairs(c[2], x + 8), pairs(c[3], x + 12))));
  }
};
struct Int4Half {
  static constexpr int kInputs = 8;
  __m256i c[2];
  explicit Int4Half(const uint8_t* at) {
    const __m256i packed = _mm256_loadu_si256((const __m256i*)at);
    for (int s = 0; s < 2; s++) c[s] = and_shifted(packed, 4 * s, 15);
  }
  __m256i products(const int8_t* x) const { return widen(_mm256_add_epi16(pairs(c[0], x), pairs(c[1], x + 4))); }  // two pairs of at most 2 * 15 * 128
};
struct TileHalf {  // unpacked codes up to 15
  static constexpr int kInputs = 4;
  __m256i c;
  explicit TileHalf(const uint8_t* at) : c(_mm256_loadu_si256((const __m256i*)at)) {}
  __m256i products(const int8_t* x) const { return widen(pairs(c, x)); }
};
struct Int8Half {  // a pair of products of up to 255 * 128 does not fit into 16 bits: the code's halves apart, each up to 15
  static constexpr int kInputs = 4;
  __m256i low, high;
  explicit Int8Half(const uint8_t* at) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)at);
    low = and_shifted(codes, 0, 15), high = and_shifted(codes, 4, 15);
  }
  __m256i products(const int8_t* x) const {
    return _mm256_add_epi32(widen(pairs(low, x)), _mm256_slli_epi32(widen(pairs(high, x)), 4));
  }
};
template <class Half>
struct Halves {
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    for (int half = 0; half < 2; half++) {
      __m256i acc[T];
      for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_si256();
      for (int64_t v = 0; v < n_vectors; v++) {
        const uint8_t* at = codes + 64 * v + 32 * half;
        if (half == 0) prefetch(at);
        const Half weights(at);
        for (int t = 0; t < T; t++) acc[t] = _mm256_add_epi32(acc[t], weights.products(x + t * x_stride + Half::kInputs * v));
      }
      for (int t = 0; t < T; t++) _mm256_storeu_si256((__m256i*)(dots + t) + half, acc[t]);
    }
  }
};
using TwoBit = Halves<TwoBitHalf>;
using Int4 = Halves<Int4Half>;
using Int8 = Halves<Int8Half>;
using Base3 = UnpackedBase3<Halves<TileHalf>>;

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
    int32_t* to = out + half / 2 * bitnet::kGemmTokens * 16 + 8 * (half % 2);
    int t = 0;
    for (; t + 8 <= n_tokens; t += 8) gemm_block<8, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
    for (; t + 4 <= n_tokens; t += 4) gemm_block<4, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
    for (; t < n_tokens; t++) gemm_block<1, Steps>(from, inputs, x + t * x_stride, x_stride, first, to + 16 * t);
  }
}
constexpr bitnet::GemmInteger no_gemm = nullptr;  // many tokens go through multiply_i8 in blocks
}  // namespace

namespace bitnet {
const Kernels kAvx2 = BITNET_KERNELS("avx2", unpack_b3, gemm<60>, gemm<8>, no_gemm);
}
