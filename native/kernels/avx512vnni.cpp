// AVX-512 with VNNI: one instruction multiplies 64 codes (unsigned) by 64 activations (signed) and adds them by fours.
#include <immintrin.h>

#include "kernels.h"

namespace {
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline __attribute__((always_inline)) v16 load_f16(const uint16_t* p) {
  return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static inline __attribute__((always_inline)) void store_f16(v16 x, uint16_t* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

static inline __m512i broadcast4(const int8_t* x) { return _mm512_set1_epi32(*(const int32_t __attribute__((may_alias, aligned(1)))*)x); }

// One token: the codes stay where they are in their bytes, and the factors 1, 4, 16, 64 leave with the accumulators.
static void t2_one(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int32_t* out) {
  const __m512i m0 = _mm512_set1_epi8(0x03), m1 = _mm512_set1_epi8(0x0c), m2 = _mm512_set1_epi8(0x30), m3 = _mm512_set1_epi8((char)0xc0);
  __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0;
  for (int64_t v = 0; v < n_vectors; v++, panel += 64, x += 16) {
    _mm_prefetch((const char*)panel + 6144, _MM_HINT_T1);  // memory -> L2: without it 17 GB/s instead of 29 on two cores
    _mm_prefetch((const char*)panel + 1024, _MM_HINT_T0);  // L2 -> L1
    __m512i packed = _mm512_loadu_si512(panel);
    a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(packed, m0), broadcast4(x));
    a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(packed, m1), broadcast4(x + 4));
    a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(packed, m2), broadcast4(x + 8));
    a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(packed, m3), broadcast4(x + 12));
  }
  __m512i low = _mm512_add_epi32(a0, _mm512_srai_epi32(a1, 2));
  __m512i high = _mm512_add_epi32(_mm512_srai_epi32(a2, 4), _mm512_srai_epi32(a3, 6));
  _mm512_storeu_si512(out, _mm512_add_epi32(low, high));
}

template <int T>
static inline void t2_block(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int64_t x_stride, int32_t* out) {
  const __m512i three = _mm512_set1_epi8(3);
  __m512i acc[T];
  for (int t = 0; t < T; t++) acc[t] = _mm512_setzero_si512();
  for (int64_t v = 0; v < n_vectors; v++) {
    __m512i packed = _mm512_loadu_si512(panel + 64 * v);
    __m512i codes[4] = {_mm512_and_si512(packed, three), _mm512_and_si512(_mm512_srli_epi16(packed, 2), three),
                        _mm512_and_si512(_mm512_srli_epi16(packed, 4), three), _mm512_and_si512(_mm512_srli_epi16(packed, 6), three)};
    for (int s = 0; s < 4; s++)
      for (int t = 0; t < T; t++) acc[t] = _mm512_dpbusd_epi32(acc[t], codes[s], broadcast4(x + t * x_stride + 16 * v + 4 * s));
  }
  for (int t = 0; t < T; t++) _mm512_storeu_si512(out + 16 * t, acc[t]);
}

template <int T>
static inline void i8_block(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int64_t x_stride, int32_t* out) {
  __m512i acc[T], odd[T];  // two chains per token hide the latency of the accumulation
  for (int t = 0; t < T; t++) acc[t] = odd[t] = _mm512_setzero_si512();
  int64_t v = 0;
  for (; v + 2 <= n_vectors; v += 2) {
    _mm_prefetch((const char*)panel + 64 * v + 4096, _MM_HINT_T1);
    _mm_prefetch((const char*)panel + 64 * v + 4160, _MM_HINT_T1);
    __m512i w0 = _mm512_loadu_si512(panel + 64 * v), w1 = _mm512_loadu_si512(panel + 64 * v + 64);
    for (int t = 0; t < T; t++) {
      acc[t] = _mm512_dpbusd_epi32(acc[t], w0, broadcast4(x + t * x_stride + 4 * v));
      odd[t] = _mm512_dpbusd_epi32(odd[t], w1, broadcast4(x + t * x_stride + 4 * v + 4));
    }
  }
  if (v < n_vectors)
    for (int t = 0; t < T; t++)
      acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_loadu_si512(panel + 64 * v), broadcast4(x + t * x_stride + 4 * v));
  for (int t = 0; t < T; t++) _mm512_storeu_si512(out + 16 * t, _mm512_add_epi32(acc[t], odd[t]));
}

static void dot_t2_i8(const uint8_t* panel, int64_t n, const int8_t* x, int64_t stride, int n_tokens, int32_t* out) {
  int t = 0;
  for (; t + 8 <= n_tokens; t += 8) t2_block<8>(panel, n, x + t * stride, stride, out + 16 * t);
  for (; t + 4 <= n_tokens; t += 4) t2_block<4>(panel, n, x + t * stride, stride, out + 16 * t);
  for (; t < n_tokens; t++) t2_one(panel, n, x + t * stride, out + 16 * t);
}
static void dot_i8_i8(const uint8_t* panel, int64_t n, const int8_t* x, int64_t stride, int n_tokens, int32_t* out) {
  int t = 0;
  for (; t + 8 <= n_tokens; t += 8) i8_block<8>(panel, n, x + t * stride, stride, out + 16 * t);
  for (; t < n_tokens; t++) i8_block<1>(panel, n, x + t * stride, stride, out + 16 * t);
}

// P panels x T tokens in registers: each vector of codes meets T broadcasts of four activations.
template <int P, int T>
static inline void gemm_block(const uint8_t* codes, int64_t panel_bytes, int64_t inputs, const int8_t* x, int64_t x_stride, int32_t* out) {
  __m512i acc[P][T];
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++) acc[p][t] = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs; k += 4) {
    __m512i w[P];
    for (int p = 0; p < P; p++) w[p] = _mm512_loadu_si512(codes + p * panel_bytes + 16 * k);
    for (int t = 0; t < T; t++) {
      const __m512i xt = broadcast4(x + t * x_stride + k);
      for (int p = 0; p < P; p++) acc[p][t] = _mm512_dpbusd_epi32(acc[p][t], w[p], xt);
    }
  }
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++) _mm512_storeu_si512(out + (p * bitnet::kGemmTokens + t) * 16, acc[p][t]);
}
template <int P>
static void gemm_panels(const uint8_t* codes, int64_t panel_bytes, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens, int32_t* out) {
  int t = 0;
  for (; t + 12 <= n_tokens; t += 12) gemm_block<P, 12>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, out + 16 * t);
  for (; t + 4 <= n_tokens; t += 4) gemm_block<P, 4>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, out + 16 * t);
  for (; t < n_tokens; t++) gemm_block<P, 1>(codes, panel_bytes, inputs, x + t * x_stride, x_stride, out + 16 * t);
}
static void gemm_u8_i8(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride,
                       int n_tokens, int32_t* out) {
  if (n_panels == 2) gemm_panels<2>(codes, panel_bytes, inputs, x, x_stride, n_tokens, out);
  else gemm_panels<1>(codes, panel_bytes, inputs, x, x_stride, n_tokens, out);
}
}  // namespace

#include "float_ops.h"

namespace bitnet {
const Kernels kAvx512Vnni = BITNET_KERNELS("avx512vnni");
}
