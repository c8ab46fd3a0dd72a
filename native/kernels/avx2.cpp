// AVX2, FMA and F16C: most x86 machines since 2013.
#include <immintrin.h>

#include "kernels.h"

namespace {
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline __attribute__((always_inline)) v16 load_f16(const uint16_t* p) {
  union { __m256 half[2]; v16 all; } x;
  x.half[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  x.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  return x.all;
}
static inline __attribute__((always_inline)) void store_f16(v16 v, uint16_t* p) {
  union { v16 all; __m256 half[2]; } x = {v};
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.half[1], _MM_FROUND_TO_NEAREST_INT));
}
static inline __attribute__((always_inline)) v16 fma16(v16 a, v16 b, v16 c) {
  union U { v16 all; __m256 half[2]; } x = {a}, y = {b}, z = {c};
  z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
  z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
  return z.all;
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
