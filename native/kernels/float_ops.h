// Float operations over 16 lanes, written once with the compiler's vector types and compiled once per instruction set.
//
// Lane l of a vector holds elements l, l + 16, l + 32, ...; sums over lanes are a fixed tree. So the result does not depend on
// how wide the machine's registers are. The including file defines, for its instruction set, load_f16, store_f16, fma16 (a * b + c,
// rounded once) and kSums, how many v16 sums its registers hold. The compiler itself fuses nothing (-ffp-contract=off).
#pragma once
#include "kernels.h"
#include "lanes.h"

namespace {
using bitnet::kGemmTokens;

template <int N> struct Count { static constexpr int count = N; };
BITNET_INLINE v16 vmax(v16 a, v16 b) { return select(a > b, a, b); }
BITNET_INLINE v16 vabs(v16 x) { return as_float(as_int(x) & 0x7fffffff); }

// The first n < 16 elements at p, the rest `fill`.
BITNET_INLINE v16 load_tail(const float* p, int n, float fill) {
  float x[16];
  for (int i = 0; i < 16; i++) x[i] = i < n ? p[i] : fill;
  return load(x);
}
BITNET_INLINE void store_tail(float* p, int n, v16 x) {
  for (int i = 0; i < n; i++) p[i] = x[i];
}

BITNET_INLINE float sum_lanes(v16 x) {  // halves, and halves of those
  float a[16];
  store(a, x);
  for (int n = 8; n > 2; n /= 2)
    for (int i = 0; i < n; i++) a[i] += a[i + n];
  return (a[0] + a[2]) + (a[1] + a[3]);
}
template <int Bit>
BITNET_INLINE i16x lanes_with() {
  alignas(64) static constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (load_int(kLaneNumbers) & Bit) > splat_int(0);
}
BITNET_INLINE float max_lanes(v16 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
}

// exp(x) for x <= 0, about 2 ulp; 0 below -87. 2^n * p(r) with n = round(x / ln 2), |r| <= ln 2 / 2 in two parts
// (Cody and Waite); p is the Taylor polynomial of degree 7, whose remainder is below 2^-26.
BITNET_INLINE v16 exp_nonpositive(v16 x) {
  const i16x tiny = x < splat(-87.0f);
  x = vmax(x, splat(-87.0f));
  v16 shifted = fma16(x, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: the low bits are the rounded integer
  v16 n = shifted - 12582912.0f;
  v16 r = fma16(n, splat(2.12194440e-4f), fma16(n, splat(-0.693359375f), x));
  v16 p = splat(1.0f / 5040);
  p = fma16(p, r, splat(1.0f / 720));
  p = fma16(p, r, splat(1.0f / 120));
  p = fma16(p, r, splat(1.0f / 24));
  p = fma16(p, r, splat(1.0f / 6));
  p = fma16(p, r, splat(0.5f));
  p = fma16(p, r, splat(1.0f));
  p = fma16(p, r, splat(1.0f));
  const i16x power = (as_int(shifted) - 0x4b400000 + 127) << 23;
  return select(tiny, splat(0.0f), p * as_float(power));
}

// memory -> L2, and L2 -> L1. Always inlined: gcc takes a call that only prefetches for one without effect.
BITNET_INLINE void prefetch(const uint8_t* at, int64_t into_l2 = bitnet::kFetchAhead.into_l2) {
  __builtin_prefetch(at + into_l2, 0, 2);
  if (bitnet::kFetchAhead.into_l1) __builtin_prefetch(at + bitnet::kFetchAhead.into_l1, 0, 3);
}

// Dense weights: what is stored for 16 rows of one input, widened.
struct DenseF32 {
  using Stored = float;
  BITNET_INLINE v16 widen(const Stored* p) { return load(p); }
};
struct DenseF16 {
  using Stored = uint16_t;
  BITNET_INLINE v16 widen(const Stored* p) { return load_f16(p); }
};
struct DenseBf16 {
  using Stored = uint16_t;
  BITNET_INLINE v16 widen(const Stored* p) { return as_float(widen_int(p) << 16); }
};

// One panel and few tokens, which wait for memory: all four partial sums side by side, so that no chain waits for its own last sum.
template <class Dense, int T>
BITNET_INLINE void dense_sums(const typename Dense::Stored* w, int64_t n_inputs, const float* x, int64_t x_stride, v16* sums) {
  constexpr int kLine = 64 / (16 * sizeof *w);  // inputs whose weights share a cache line
  v16 acc[T][4];
  for (int t = 0; t < T; t++)
    for (int j = 0; j < 4; j++) acc[t][j] = splat(0.0f);
  for (int64_t k = 0; k < n_inputs; k += 4, w += 64)
    for (int j = 0; j < 4; j++) {
      if (j % kLine == 0) prefetch(reinterpret_cast<const uint8_t*>(w + 16 * j));
      const v16 wide = Dense::widen(w + 16 * j);
      for (int t = 0; t < T; t++) acc[t][j] = fma16(wide, splat(x[t * x_stride + k + j]), acc[t][j]);
    }
  for (int t = 0; t < T; t++) sums[t] = (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]);
}
template <class Dense, int T>
static void dense_few(const typename Dense::Stored* w, int64_t n_inputs, const float* x, int64_t x_stride, float* out) {
  v16 sums[T];
  dense_sums<Dense, T>(w, n_inputs, x, x_stride, sums);
  for (int t = 0; t < T; t++) store(out + 16 * t, sums[t]);
}
// P panels x T tokens in registers, one of the four partial sums after the other over inputs that stay in L1.
template <class Dense, int P, int T>
static void dense_block(const typename Dense::Stored* const w[P], int64_t n_inputs, const float* x, int64_t x_stride, float* out) {
  constexpr int kInputs = 64;
  v16 partial[4][P][T];
  for (int64_t k0 = 0; k0 < n_inputs; k0 += kInputs) {
    const int64_t end = k0 + kInputs < n_inputs ? k0 + kInputs : n_inputs;
    for (int j = 0; j < 4; j++) {
      v16 acc[P][T];
      for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) acc[p][t] = k0 ? partial[j][p][t] : splat(0.0f);
      for (int64_t k = k0 + j; k < end; k += 4) {
        v16 wide[P];
        for (int p = 0; p < P; p++) wide[p] = Dense::widen(w[p] + 16 * k);
        for (int t = 0; t < T; t++) {
          const v16 xt = splat(x[t * x_stride + k]);
          for (int p = 0; p < P; p++) acc[p][t] = fma16(wide[p], xt, acc[p][t]);
        }
      }
      for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) partial[j][p][t] = acc[p][t];
    }
  }
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++)
      store(out + (p * kGemmTokens + t) * 16, (partial[0][p][t] + partial[1][p][t]) + (partial[2][p][t] + partial[3][p][t]));
}
template <class Dense, int P>
static void dense_panels(const typename Dense::Stored* const w[P], int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* out) {
  constexpr int kMost = 12 * P <= kSums ? 12 : 6, kFew = 16 <= kSums ? 4 : 1;
  int t = 0;
  for (; t + kMost <= n_tokens; t += kMost) dense_block<Dense, P, kMost>(w, n_inputs, x + t * x_stride, x_stride, out + 16 * t);
  for (; kFew < 4 && t + 4 <= n_tokens; t += 4) dense_block<Dense, P, 4>(w, n_inputs, x + t * x_stride, x_stride, out + 16 * t);
  for (int p = 0; p < P; p++) {
    int s = t;
    for (; s + kFew <= n_tokens; s += kFew) dense_few<Dense, kFew>(w[p], n_inputs, x + s * x_stride, x_stride, out + (p * kGemmTokens + s) * 16);
    for (; s < n_tokens; s++) dense_few<Dense, 1>(w[p], n_inputs, x + s * x_stride, x_stride, out + (p * kGemmTokens + s) * 16);
  }
}
template <class Dense>
static void multiply_dense(const void* panels, int64_t panel_bytes, int n_panels, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens,
                           float* out) {
  using Stored = typename Dense::Stored;
  const Stored* const w[2] = {static_cast<const Stored*>(panels), reinterpret_cast<const Stored*>(static_cast<const uint8_t*>(panels) + panel_bytes)};
  constexpr int kTogether = 24 <= kSums ? 2 : 1;  // panels
  if (kTogether == 2 && n_panels == 2) return dense_panels<Dense, kTogether>(w, n_inputs, x, x_stride, n_tokens, out);
  for (int p = 0; p < n_panels; p++) dense_panels<Dense, 1>(w + p, n_inputs, x, x_stride, n_tokens, out + p * kGemmTokens * 16);
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

static float quantize(const float* x, int n, int8_t* q, int32_t* sum) {
  v16 most = splat(1e-5f);
  int i = 0;
  for (; i + 16 <= n; i += 16) most = vmax(vabs(load(x + i)), most);
  if (i < n) most = vmax(vabs(load_tail(x + i, n - i, 0.0f)), most);
  float absmax = max_lanes(most);
  float scale = 127.0f / absmax;
  i16x sums = splat_int(0);
  for (i = 0; i < n; i += 16) {
    v16 y = (i + 16 <= n ? load(x + i) : load_tail(x + i, n - i, 0.0f)) * scale + 12582912.0f;  // rounds half to even
    i16x codes = as_int(y) - 0x4b400000;
    codes = select(codes < splat_int(-128), splat_int(-128), codes);
    codes = select(codes > splat_int(127), splat_int(127), codes);
    sums += codes;
    if (i + 16 <= n) store_bytes(q + i, codes);
    else
      for (int j = 0; j < n - i; j++) q[i + j] = (int8_t)codes[j];
  }
  *sum = 0;
  for (int l = 0; l < 16; l++) *sum += sums[l];
  return absmax / 127.0f;
}

BITNET_INLINE v16 silu(v16 x) {  // x / (1 + e^-x), through e^-|x| so that nothing overflows
  v16 e = exp_nonpositive(-vabs(x));
  return x * select(x >= splat(0.0f), splat(1.0f), e) / (splat(1.0f) + e);
}
BITNET_INLINE v16 relu2(v16 x) {
  v16 y = vmax(x, splat(0.0f));
  return y * y;
}
// x/2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) * (x + 0.044715 x^3)
BITNET_INLINE v16 gelu_tanh(v16 x) {
  v16 u = (x + x * x * x * 0.044715f) * 1.59576912f;  // 2 u
  v16 e = exp_nonpositive(-vabs(u));
  return x * select(u >= splat(0.0f), splat(1.0f), e) / (splat(1.0f) + e);
}
template <v16 (*act)(v16)>
static void gate_with(const float* gate, const float* up, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, act(load(gate + i)) * load(up + i));
  if (i < n) store_tail(out + i, n - i, act(load_tail(gate + i, n - i, 0.0f)) * load_tail(up + i, n - i, 0.0f));
}

static void add(float* x, const float* y, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(x + i, load(x + i) + load(y + i));
  for (; i < n; i++) x[i] += y[i];
}
static void to_f16(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; i += 16) store_f16(load(x + i), out + i);
}
static void from_f16(const uint16_t* x, int n, float* out) {
  for (int i = 0; i < n; i += 16) store(out + i, load_f16(x + i));
}
static void rotate(float* x, int n_heads, int half, const float* cosine, const float* sine) {
  for (int h = 0; h < n_heads; h++, x += 2 * half) {
    int i = 0;
    for (; i + 16 <= half; i += 16) {
      const v16 a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
      store(x + i, a * c - b * s), store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosine[i] - b * sine[i], x[half + i] = b * cosine[i] + a * sine[i];
    }
  }
}

// (a, b) -> (a + b, a - b) of lanes that are Bit apart.
template <int Bit>
BITNET_INLINE v16 butterfly(v16 x) {
  const i16x upper = lanes_with<Bit>();
  return swap_lanes<Bit>(x) + select(upper, -x, x);
}
static void hadamard(float* x, int n, int block) {
  const float scale = 1.0f / __builtin_sqrtf((float)block);
  for (float *at = x, *end = x + n; at != end; at += block) {
    int width = 1;
    if (block >= 16) {
      for (int i = 0; i < block; i += 16) store(at + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(at + i))))));
      width = 16;
    }
    for (; width < block; width *= 2)
      for (int i = 0; i < block; i += 2 * width)
        if (width >= 16) {
          for (int j = i; j < i + width; j += 16) {
            const v16 a = load(at + j), b = load(at + j + width);
            store(at + j, a + b), store(at + j + width, a - b);
          }
        } else {
          for (int j = i; j < i + width; j++) {
            const float a = at[j], b = at[j + width];
            at[j] = a + b, at[j + width] = a - b;
          }
        }
    int i = 0;
    for (; i + 16 <= block; i += 16) store(at + i, load(at + i) * scale);
    for (; i < block; i++) at[i] *= scale;
  }
}
static void split_weights(const float* p, const uint16_t* scales, int n, int8_t* high, int8_t* low, float* high_step, float* low_step, int32_t* high_sum,
                          int32_t* low_sum) {
  v16 w[4], most = splat(1e-30f);
  const int n_vectors = n / 16;
  for (int i = 0; i < n_vectors; i++) w[i] = load(p + 16 * i) * load_f16(scales + 16 * i), most = vmax(w[i], most);
  const float top = fold_lanes(most, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; }), inverse = 16256.0f / top;
  i16x high_sums = splat_int(0), low_sums = splat_int(0);
  for (int i = 0; i < n_vectors; i++) {
    const i16x whole = as_int(w[i] * inverse + 12582912.0f) - 0x4b400000, upper = (whole + 64) >> 7, lower = whole - (upper << 7);
    store_bytes(high + 16 * i, upper), store_bytes(low + 16 * i, lower);
    high_sums += upper, low_sums += lower;
  }
  *low_step = top / 16256.0f, *high_step = 128.0f * *low_step;
  const auto add = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
  *high_sum = fold_lanes(high_sums, add), *low_sum = fold_lanes(low_sums, add);
}

// Q queries and B blocks at once: Q B sums that do not wait for one another. A score is one chain, dimension after dimension.
template <int Q, int B>
BITNET_INLINE void scores_some(const float* q, const uint16_t* k, int head_dim, float scale, float* out, int64_t stride) {
  v16 sum[Q][B];
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) sum[i][b] = splat(0.0f);
  for (int d = 0; d < head_dim; d++) {
    v16 key[B];
    for (int b = 0; b < B; b++) key[b] = load_f16(k + (b * head_dim + d) * 16);
    for (int i = 0; i < Q; i++) {
      const v16 query = splat(q[i * head_dim + d]);
      for (int b = 0; b < B; b++) sum[i][b] = fma16(key[b], query, sum[i][b]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) store(out + i * stride + 16 * b, sum[i][b] * scale);
}
// As many queries at once as kSums allows.
template <int B>
static void scores_blocks(const float* q, int n_queries, const uint16_t* k, int head_dim, float scale, float* out, int64_t stride) {
  int i = 0;
  if constexpr (12 * B <= kSums)
    for (; i + 12 <= n_queries; i += 12) scores_some<12, B>(q + i * head_dim, k, head_dim, scale, out + i * stride, stride);
  if constexpr (6 * B <= kSums && 12 * B > kSums)
    for (; i + 6 <= n_queries; i += 6) scores_some<6, B>(q + i * head_dim, k, head_dim, scale, out + i * stride, stride);
  if constexpr (4 * B <= kSums)
    for (; i + 4 <= n_queries; i += 4) scores_some<4, B>(q + i * head_dim, k, head_dim, scale, out + i * stride, stride);
  if constexpr (2 * B <= kSums)
    for (; i + 2 <= n_queries; i += 2) scores_some<2, B>(q + i * head_dim, k, head_dim, scale, out + i * stride, stride);
  for (; i < n_queries; i++) scores_some<1, B>(q + i * head_dim, k, head_dim, scale, out + i * stride, stride);
}
static void scores_f16(const float* q, int n_queries, const uint16_t* k, int n_blocks, int head_dim, float scale, float* out, int64_t stride) {
  int b = 0;  // the fewer the queries, the more blocks
  auto run = [&](auto blocks, int most_queries) {
    constexpr int B = decltype(blocks)::count;
    for (; B <= kSums && n_queries <= most_queries && b + B <= n_blocks; b += B)
      scores_blocks<B>(q, n_queries, k + b * 16 * head_dim, head_dim, scale, out + 16 * b, stride);
  };
  if constexpr (kSums >= 16) run(Count<8>(), 2), run(Count<4>(), 4), run(Count<2>(), 1 << 30);
  else run(Count<4>(), 1), run(Count<2>(), 2);
  run(Count<1>(), 1 << 30);
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
  for (int j = 0; j < n; j++, v += head_dim) {
    v16 value[W];
    for (int w = 0; w < W; w++) value[w] = load_f16(v + 16 * w);
    for (int i = 0; i < Q; i++) {
      const v16 weight = splat(p[i * stride + j]);
      for (int w = 0; w < W; w++) sum[i][w] = fma16(value[w], weight, sum[i][w]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int w = 0; w < W; w++) store(out + i * head_dim + 16 * w, sum[i][w]);
}
template <int Q>
BITNET_INLINE void weigh_of(const float* p, int64_t stride, const uint16_t* v, int n, int head_dim, float* out) {
  int d = 0;
  if constexpr (8 * Q <= kSums)
    for (; d + 128 <= head_dim; d += 128) weigh_some<Q, 8>(p, stride, v + d, n, head_dim, out + d);
  if constexpr (4 * Q <= kSums)
    for (; d + 64 <= head_dim; d += 64) weigh_some<Q, 4>(p, stride, v + d, n, head_dim, out + d);
  if constexpr (2 * Q <= kSums)
    for (; d + 32 <= head_dim; d += 32) weigh_some<Q, 2>(p, stride, v + d, n, head_dim, out + d);
  for (; d < head_dim; d += 16) weigh_some<Q, 1>(p, stride, v + d, n, head_dim, out + d);
}
static void weigh_f16(const float* p, int64_t stride, int n_queries, const uint16_t* v, int n, int head_dim, float* out) {
  int i = 0;
  if constexpr (12 <= kSums)
    for (; i + 12 <= n_queries; i += 12) weigh_of<12>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  else
    for (; i + 6 <= n_queries; i += 6) weigh_of<6>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  if constexpr (4 <= kSums)
    for (; i + 4 <= n_queries; i += 4) weigh_of<4>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  for (; i + 2 <= n_queries; i += 2) weigh_of<2>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
  for (; i < n_queries; i++) weigh_of<1>(p + i * stride, stride, v, n, head_dim, out + i * head_dim);
}

static uint64_t read_bytes(const void* p, int64_t bytes) {
  typedef uint64_t Quads __attribute__((vector_size(kPartBytes), aligned(8), may_alias));
  constexpr int kSumsHere = 4 * kParts < 8 ? 4 * kParts : 8;
  const uint8_t *at = static_cast<const uint8_t*>(p), *end = at + bytes;
  Quads sum[kSumsHere] = {};
  for (; at + kSumsHere * kPartBytes <= end; at += kSumsHere * kPartBytes)
    for (int j = 0; j < kSumsHere; j++) {
      if (j % kParts == 0) prefetch(at + j * kPartBytes);
      sum[j] ^= reinterpret_cast<const Quads*>(at)[j];
    }
  for (; at < end; at += kPartBytes) sum[0] ^= *reinterpret_cast<const Quads*>(at);
  uint64_t all = 0;
  for (int j = 0; j < kSumsHere; j++)
    for (int i = 0; i < kPartBytes / 8; i++) all ^= sum[j][i];
  return all;
}

}  // namespace
