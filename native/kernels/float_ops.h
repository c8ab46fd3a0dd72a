// Float operations over 16 lanes, written once with the compiler's vector types and compiled once per instruction set.
//
// Lane l of a vector holds elements l, l + 16, l + 32, ...; sums over lanes are a fixed tree. So the result does not depend on
// how wide the machine's registers are. The including file defines load_f16 and store_f16 for its instruction set first.
#pragma once
#include <stdint.h>

namespace {

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
#define BITNET_INLINE static inline __attribute__((always_inline))

BITNET_INLINE v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
BITNET_INLINE v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
BITNET_INLINE void store(float* p, v16 x) { *reinterpret_cast<v16*>(p) = x; }
BITNET_INLINE v16 vmax(v16 a, v16 b) { return a > b ? a : b; }
BITNET_INLINE v16 vabs(v16 x) { return (v16)((i16x)x & 0x7fffffff); }

// The first n < 16 elements at p, the rest `fill`.
BITNET_INLINE v16 load_tail(const float* p, int n, float fill) {
  v16 x = splat(fill);
  for (int i = 0; i < n; i++) x[i] = p[i];
  return x;
}
BITNET_INLINE void store_tail(float* p, int n, v16 x) {
  for (int i = 0; i < n; i++) p[i] = x[i];
}

BITNET_INLINE float sum_lanes(v16 x) {
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
BITNET_INLINE float max_lanes(v16 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
}

// exp(x) for x <= 0, about 2 ulp; 0 below -87. 2^n * p(r) with n = round(x / ln 2), |r| <= ln 2 / 2 in two parts
// (Cody and Waite); p is the Taylor polynomial of degree 7, whose remainder is below 2^-26.
BITNET_INLINE v16 exp_nonpositive(v16 x) {
  i16x tiny = x < splat(-87.0f);
  x = vmax(x, splat(-87.0f));
  v16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the rounded integer
  v16 n = shifted - 12582912.0f;
  v16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  v16 p = splat(1.0f / 5040);
  p = p * r + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  i16x power = ((i16x)shifted - 0x4b400000 + 127) << 23;
  v16 y = p * (v16)power;
  return tiny ? splat(0.0f) : y;
}

template <v16 (*load_weights)(const void*, int64_t), int T>
BITNET_INLINE void dot_dense_block(const void* panel, int64_t n_inputs, const float* x, int64_t x_stride, float* out) {
  v16 acc[T][4];
  for (int t = 0; t < T; t++)
    for (int j = 0; j < 4; j++) acc[t][j] = splat(0.0f);
  for (int64_t k = 0; k < n_inputs; k += 4)
    for (int j = 0; j < 4; j++) {
      v16 w = load_weights(panel, (k + j) * 16);
      for (int t = 0; t < T; t++) acc[t][j] += w * x[t * x_stride + k + j];
    }
  for (int t = 0; t < T; t++) store(out + 16 * t, (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]));
}
template <v16 (*load_weights)(const void*, int64_t)>
static void dot_dense(const void* panel, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* out) {
  int t = 0;
  for (; t + 4 <= n_tokens; t += 4) dot_dense_block<load_weights, 4>(panel, n_inputs, x + t * x_stride, x_stride, out + 16 * t);
  for (; t < n_tokens; t++) dot_dense_block<load_weights, 1>(panel, n_inputs, x + t * x_stride, x_stride, out + 16 * t);
}

BITNET_INLINE v16 load_dense_f32(const void* p, int64_t i) { return load(static_cast<const float*>(p) + i); }
BITNET_INLINE v16 load_dense_f16(const void* p, int64_t i) { return load_f16(static_cast<const uint16_t*>(p) + i); }
BITNET_INLINE v16 load_dense_bf16(const void* p, int64_t i) {
  typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
  h16 bits = *reinterpret_cast<const h16*>(static_cast<const uint16_t*>(p) + i);
  return (v16)(__builtin_convertvector(bits, i16x) << 16);
}

static void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  v16 squares = splat(0.0f);
  int i = 0;
  for (; i + 16 <= n; i += 16) squares += load(x + i) * load(x + i);
  if (i < n) {
    v16 tail = load_tail(x + i, n - i, 0.0f);
    squares += tail * tail;
  }
  float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)n + eps);
  for (i = 0; i + 16 <= n; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static float quantize(const float* x, int n, int8_t* q) {
  v16 most = splat(1e-5f);
  int i = 0;
  for (; i + 16 <= n; i += 16) most = vmax(vabs(load(x + i)), most);
  if (i < n) most = vmax(vabs(load_tail(x + i, n - i, 0.0f)), most);
  float absmax = max_lanes(most);
  float scale = 127.0f / absmax;
  for (i = 0; i < n; i += 16) {
    v16 y = (i + 16 <= n ? load(x + i) : load_tail(x + i, n - i, 0.0f)) * scale + 12582912.0f;  // rounds half to even
    i16x codes = (i16x)y - 0x4b400000;
    codes = codes < -128 ? i16x{} - 128 : codes;
    codes = codes > 127 ? i16x{} + 127 : codes;
    b16 bytes = __builtin_convertvector(codes, b16);
    if (i + 16 <= n) *reinterpret_cast<b16*>(q + i) = bytes;
    else
      for (int j = 0; j < n - i; j++) q[i + j] = bytes[j];
  }
  return absmax / 127.0f;
}

BITNET_INLINE v16 silu(v16 x) {  // x / (1 + e^-x), through e^-|x| so that nothing overflows
  v16 e = exp_nonpositive(-vabs(x));
  return x * (x >= splat(0.0f) ? splat(1.0f) : e) / (splat(1.0f) + e);
}
BITNET_INLINE v16 relu2(v16 x) {
  v16 y = vmax(x, splat(0.0f));
  return y * y;
}
// x/2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) * (x + 0.044715 x^3)
BITNET_INLINE v16 gelu_tanh(v16 x) {
  v16 u = (x + x * x * x * 0.044715f) * 1.59576912f;  // 2 u
  v16 e = exp_nonpositive(-vabs(u));
  return x * (u >= splat(0.0f) ? splat(1.0f) : e) / (splat(1.0f) + e);
}
template <v16 (*act)(v16)>
static void gate_with(const float* gate, const float* up, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, act(load(gate + i)) * load(up + i));
  if (i < n) store_tail(out + i, n - i, act(load_tail(gate + i, n - i, 0.0f)) * load_tail(up + i, n - i, 0.0f));
}

static void scale_sums(const int32_t* dots, const int32_t* x_sums, int64_t stride, int bias, const float* scale, const float* steps,
                       int64_t step_stride, int n_tokens, float* sums) {
  const v16 s = load(scale);
  for (int t = 0; t < n_tokens; t++) {
    i16x exact = *reinterpret_cast<const i16x*>(dots + 16 * t) - bias * x_sums[t * stride];
    v16 part = __builtin_convertvector(exact, v16) * s;
    store(sums + 16 * t, load(sums + 16 * t) + (steps ? part * steps[t * step_stride] : part));
  }
}
static void unpack_t2(const uint8_t* panel, int64_t n_vectors, uint8_t* codes) {
  typedef uint8_t u64x __attribute__((vector_size(64), aligned(1), may_alias));
  for (int64_t v = 0; v < n_vectors; v++) {
    const u64x packed = *reinterpret_cast<const u64x*>(panel + 64 * v);
    for (int s = 0; s < 4; s++) *reinterpret_cast<u64x*>(codes + 256 * v + 64 * s) = (packed >> (2 * s)) & 3;
  }
}

static void add(float* x, const float* y, int n) {
  for (int i = 0; i < n; i++) x[i] += y[i];
}
static void to_f16(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; i += 16) store_f16(load(x + i), out + i);  // n is a padded head size
}

// Q queries and B blocks at once: 2 Q B sums that do not wait for one another.
template <int Q, int B>
BITNET_INLINE void scores_some(const float* q, const uint16_t* k, int head_dim, float scale, float* out, int64_t stride) {
  v16 even[Q][B], odd[Q][B];
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) even[i][b] = odd[i][b] = splat(0.0f);
  for (int d = 0; d < head_dim; d += 2)
    for (int b = 0; b < B; b++) {
      const uint16_t* at = k + (b * head_dim + d) * 16;
      const v16 k0 = load_f16(at), k1 = load_f16(at + 16);
      for (int i = 0; i < Q; i++) even[i][b] += k0 * q[i * head_dim + d], odd[i][b] += k1 * q[i * head_dim + d + 1];
    }
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) store(out + i * stride + 16 * b, (even[i][b] + odd[i][b]) * scale);
}
template <int Q>
BITNET_INLINE void scores_of(const float* q, const uint16_t* k, int n_blocks, int head_dim, float scale, float* out, int64_t stride) {
  constexpr int B = 4 / Q;
  int b = 0;
  for (; b + B <= n_blocks; b += B) scores_some<Q, B>(q, k + b * 16 * head_dim, head_dim, scale, out + 16 * b, stride);
  for (; b < n_blocks; b++) scores_some<Q, 1>(q, k + b * 16 * head_dim, head_dim, scale, out + 16 * b, stride);
}
static void scores_f16(const float* q, int n_queries, const uint16_t* k, int n_blocks, int head_dim, float scale, float* out, int64_t stride) {
  int i = 0;
  for (; i + 4 <= n_queries; i += 4) scores_of<4>(q + i * head_dim, k, n_blocks, head_dim, scale, out + i * stride, stride);
  for (; i + 2 <= n_queries; i += 2) scores_of<2>(q + i * head_dim, k, n_blocks, head_dim, scale, out + i * stride, stride);
  for (; i < n_queries; i++) scores_of<1>(q + i * head_dim, k, n_blocks, head_dim, scale, out + i * stride, stride);
}

static float softmax(float* scores, int n) {
  int padded = (n + 15) / 16 * 16;
  for (int i = n; i < padded; i++) scores[i] = -__builtin_inff();
  v16 most = load(scores);
  for (int i = 16; i < padded; i += 16) most = vmax(load(scores + i), most);
  float top = max_lanes(most);
  v16 sum = splat(0.0f);
  for (int i = 0; i < padded; i += 16) {
    v16 e = exp_nonpositive(load(scores + i) - top);
    store(scores + i, e);
    sum += e;
  }
  return sum_lanes(sum);
}

template <int Q, int W>
BITNET_INLINE void weigh_some(const float* p, int64_t stride, const uint16_t* v, int n, int head_dim, float* out) {
  v16 sum[Q][W];
  for (int i = 0; i < Q; i++)
    for (int w = 0; w < W; w++) sum[i][w] = load(out + i * head_dim + 16 * w);
  for (int j = 0; j < n; j++, v += head_dim)
    for (int w = 0; w < W; w++) {
      const v16 value = load_f16(v + 16 * w);
      for (int i = 0; i < Q; i++) sum[i][w] += value * p[i * stride + j];
    }
  for (int i = 0; i < Q; i++)
    for (int w = 0; w < W; w++) store(out + i * head_dim + 16 * w, sum[i][w]);
}
template <int Q>
BITNET_INLINE void weigh_of(const float* p, int64_t stride, const uint16_t* v, int n, int head_dim, float* out) {
  int d = 0;
  for (; Q == 1 && d + 128 <= head_dim; d += 128) weigh_some<Q, 8>(p, stride, v + d, n, head_dim, out + d);
  for (; d + 64 <= head_dim; d += 64) weigh_some<Q, 4>(p, stride, v + d, n, head_dim, out + d);
  for (; d < head_dim; d += 16) weigh_some<Q, 1>(p, stride, v + d, n, head_dim, out + d);
}
static void weigh_f16(const float* p, int64_t stride, int n_queries, const uint16_t* v, int n, int head_dim, float* out) {
  int i = 0;
  for (; i + 4 <= n_queries; i += 4) weigh_of<4>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  for (; i + 2 <= n_queries; i += 2) weigh_of<2>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  for (; i < n_queries; i++) weigh_of<1>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
}

static uint64_t read_bytes(const void* p, int64_t bytes) {
  typedef uint64_t u8x __attribute__((vector_size(64), may_alias));
  const u8x* v = static_cast<const u8x*>(p);
  u8x sum[4] = {};
  int64_t i = 0, n = bytes / 64;
  for (; i + 4 <= n; i += 4) {
    __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 4096, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 4096 + 128, 0, 2);
    for (int j = 0; j < 4; j++) sum[j] ^= v[i + j];
  }
  for (; i < n; i++) sum[0] ^= v[i];
  u8x s = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
  return s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

}  // namespace

#define BITNET_KERNELS(name)                                                                                                   \
  {                                                                                                                            \
    name, dot_t2_i8, dot_i8_i8, gemm_u8_i8, unpack_t2, scale_sums, dot_dense<load_dense_f16>, dot_dense<load_dense_bf16>,       \
        dot_dense<load_dense_f32>, rms_norm, quantize, gate_with<silu>, gate_with<relu2>, gate_with<gelu_tanh>, add, to_f16,    \
        scores_f16, softmax, weigh_f16, read_bytes                                                                             \
  }
