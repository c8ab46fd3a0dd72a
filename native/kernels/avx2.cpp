// AVX2 and F16C: most x86 machines since 2013.
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

static inline __m256i broadcast4(const int8_t* x) { return _mm256_set1_epi32(*(const int32_t __attribute__((may_alias, aligned(1)))*)x); }

// maddubs adds two products of at most 2 * 128 into an int16, four of those are added before widening: at most 2,048.
template <int T>
static inline void t2_block(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int64_t x_stride, int32_t* out) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i acc[T];
    for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_si256();
    for (int64_t v = 0; v < n_vectors; v++) {
      __m256i packed = _mm256_loadu_si256((const __m256i*)(panel + 64 * v + 32 * half));
      __m256i c0 = _mm256_and_si256(packed, three), c1 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), three);
      __m256i c2 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), three), c3 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), three);
      for (int t = 0; t < T; t++) {
        const int8_t* xt = x + t * x_stride + 16 * v;
        __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(c0, broadcast4(xt)), _mm256_maddubs_epi16(c1, broadcast4(xt + 4)));
        __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(c2, broadcast4(xt + 8)), _mm256_maddubs_epi16(c3, broadcast4(xt + 12)));
        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_add_epi16(low, high), ones));
      }
    }
    for (int t = 0; t < T; t++) _mm256_storeu_si256((__m256i*)(out + 16 * t + 8 * half), acc[t]);
  }
}

// Codes up to 255 would saturate maddubs, so both sides are widened to int16: row r's four products are in one 64-bit lane.
template <int T>
static inline void i8_block(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int64_t x_stride, int32_t* out) {
  for (int quarter = 0; quarter < 4; quarter++) {
    __m256i acc[T];
    for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_si256();
    for (int64_t v = 0; v < n_vectors; v++) {
      __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(panel + 64 * v + 16 * quarter)));
      for (int t = 0; t < T; t++) {
        __m128i x4 = _mm_set1_epi32(*(const int32_t __attribute__((may_alias, aligned(1)))*)(x + t * x_stride + 4 * v));
        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(w, _mm256_cvtepi8_epi16(x4)));
      }
    }
    for (int t = 0; t < T; t++) {
      __m128i pairs = _mm_hadd_epi32(_mm256_castsi256_si128(acc[t]), _mm256_extracti128_si256(acc[t], 1));
      _mm_storeu_si128((__m128i*)(out + 16 * t + 4 * quarter), pairs);
    }
  }
}

#define BITNET_TOKEN_BLOCKS(function, block)                                                                                       \
  static void function(const uint8_t* panel, int64_t n, const int8_t* x, int64_t stride, int n_tokens, int32_t* out) {             \
    int t = 0;                                                                                                                     \
    for (; t + 4 <= n_tokens; t += 4) block<4>(panel, n, x + t * stride, stride, out + 16 * t);                                    \
    for (; t < n_tokens; t++) block<1>(panel, n, x + t * stride, stride, out + 16 * t);                                            \
  }
BITNET_TOKEN_BLOCKS(dot_t2_i8, t2_block)
BITNET_TOKEN_BLOCKS(dot_i8_i8, i8_block)
constexpr bitnet::GemmInteger gemm_u8_i8 = nullptr;  // many tokens go through dot_* in blocks
}  // namespace

#include "float_ops.h"

namespace bitnet {
const Kernels kAvx2 = BITNET_KERNELS("avx2");
}
