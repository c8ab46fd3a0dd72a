// The two products of a low-rank adapter (kernels.h: AddCodes, DotCodes), written once for every instruction set. The including file defines
// add_pairs(sum, a, b): a and b hold two integers of 16 bits in each lane, whose two products join the lane's sum. Code: int16_t, or int8_t.
#pragma once
#include "float_ops.h"

namespace {

// A x before it meets B, up to kFours fours of inputs of one token: whole numbers of 15 bits with a step for each four, so that the sums of
// four products with 16 bits fit into 32. NaN and infinity make the step NaN.
constexpr int kFours = 16;
struct RoundedFours {
  int32_t pairs[kFours][2];  // of a four the first and third, the second and fourth
  float steps[kFours];
};
BITNET_INLINE void round_fours(const float* x, int n, RoundedFours& to) {
  for (int i = 0; i < n; i++, x += 4) {
    float most = 0.0f, sum = 0.0f;
    for (int j = 0; j < 4; j++) most = __builtin_fabsf(x[j]) > most ? __builtin_fabsf(x[j]) : most, sum += x[j];
    const float inverse = most > 1e-30f ? 16383.0f / most : 0.0f;
    uint32_t codes[4];
    for (int j = 0; j < 4; j++) {
      const float shifted = x[j] * inverse + 12582912.0f;  // 1.5 * 2^23: the low bits are the rounded integer
      __builtin_memcpy(&codes[j], &shifted, 4);
      codes[j] -= 0x4b400000u;
    }
    for (int j = 0; j < 2; j++) to.pairs[i][j] = int32_t((codes[j] & 0xffff) | codes[j + 2] << 16);
    to.steps[i] = most / 16383.0f + 0.0f * sum;
  }
}
// A four of 16 rows, in pairs as above.
struct CodePairs {
  i16x even, odd;
};
BITNET_INLINE CodePairs load_pairs(const int16_t* from) {
  return {load_int(reinterpret_cast<const int32_t*>(from)), load_int(reinterpret_cast<const int32_t*>(from + 32))};
}
BITNET_INLINE CodePairs load_pairs(const int8_t* from) {
  typedef int16_t Halves __attribute__((vector_size(4 * kLanes)));
  const i16x bytes = load_int(reinterpret_cast<const int32_t*>(from));
  return {for_parts<i16x>([&](int p) __attribute__((always_inline)) { return IntPart(Halves(bytes.part[p]) << 8 >> 8); }),
          for_parts<i16x>([&](int p) __attribute__((always_inline)) { return IntPart(Halves(bytes.part[p]) >> 8); })};
}
// An adapter's B: panels of few inputs, `panel` apart, of which n fours. N: n where that is known, so that the loop is unrolled; else 0.
template <int N, int T, class Code>
BITNET_INLINE void add_panels(const Code* w, int64_t panel, int n_rows, int n, const RoundedFours* x, float* y, int64_t y_stride) {
  if (N) n = N;
  for (int row = 0; row < n_rows; row += 16, w += panel) {
    const int rows = n_rows - row;
    v16 sum[T];
    for (int t = 0; t < T; t++) sum[t] = rows >= 16 ? load(y + t * y_stride + row) : load_tail(y + t * y_stride + row, rows, 0.0f);
    for (int i = 0; i < n; i++) {
      const Code* at = w + 64 * i;
      for (int j = 0; j < int(sizeof *w); j++) __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + 64 * j + 2048, 0, 3);
      const CodePairs codes = load_pairs(at);
      for (int t = 0; t < T; t++) {
        const i16x dots = add_pairs(add_pairs(splat_int(0), codes.even, splat_int(x[t].pairs[i][0])), codes.odd, splat_int(x[t].pairs[i][1]));
        sum[t] = fma16(to_float(dots), splat(x[t].steps[i]), sum[t]);
      }
    }
    for (int t = 0; t < T; t++)
      if (rows >= 16) store(y + t * y_stride + row, sum[t]);
      else store_tail(y + t * y_stride + row, rows, sum[t]);
  }
}
template <int T, class Code>
BITNET_INLINE void add_tokens(const Code* panels, int n_rows, int64_t n_inputs, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  RoundedFours rounded[T];
  for (int64_t k = 0; k < n_inputs; k += 4 * kFours) {
    const int n = n_inputs - k < 4 * kFours ? int(n_inputs - k) / 4 : kFours;
    for (int t = 0; t < T; t++) round_fours(x + t * x_stride + k, n, rounded[t]);
    if (n == 2) add_panels<2, T>(panels + 16 * k, 16 * n_inputs, n_rows, n, rounded, y, y_stride);
    else add_panels<0, T>(panels + 16 * k, 16 * n_inputs, n_rows, n, rounded, y, y_stride);
  }
}
template <class Code>
static void add_codes(const Code* panels, int n_rows, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* y, int64_t y_stride) {
  int t = 0;
  for (; t + 4 <= n_tokens; t += 4) add_tokens<4>(panels, n_rows, n_inputs, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  for (; t < n_tokens; t++) add_tokens<1>(panels, n_rows, n_inputs, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
}

// sum_lanes of N vectors, a power of two up to 16, side by side: halves of two vectors meet in one, so that all take little more than one does.
template <int N, int Bit, int R = N>
BITNET_INLINE void sum_lanes_of(v16* x, float* out) {
  if constexpr (N > 1) {
    const i16x upper = lanes_with<Bit>();
    for (int i = 0; i < N / 2; i++) {
      const v16 a = x[2 * i], b = x[2 * i + 1];
      x[i] = select(upper, b, a) + swap_lanes<Bit>(select(upper, a, b));
    }
    sum_lanes_of<N / 2, Bit / 2, R>(x, out);
  } else if constexpr (Bit) {
    x[0] = x[0] + swap_lanes<Bit>(x[0]);
    sum_lanes_of<1, Bit / 2, R>(x, out);
  } else {
    float sums[16];
    store(sums, x[0]);
    for (int r = 0; r < R; r++) out[r] = sums[(r & 1) * 8 + (r & 2) * 2 + (r & 4) / 2 + (r & 8) / 8];
  }
}
// 64 bytes of codes as floats, from the halves or quarters of the lanes; times 2^16 or 2^24.
template <class Code>
struct Widened {
  static constexpr int count = 4 / sizeof(Code), bits = 8 * sizeof(Code);
  v16 part[count];
  explicit Widened(const Code* from) {
    const i16x all = load_int(reinterpret_cast<const int32_t*>(from));
    for (int i = 0; i < count; i++) part[i] = to_float((all << (32 - bits - i * bits)) & int32_t(~0u << (32 - bits)));
  }
};
// An adapter's A: R rows x T tokens in registers.
template <int R, int T, class Code>
BITNET_INLINE void dot_block(const Code* rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  v16 acc[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = splat(0.0f);
  constexpr int kParts16 = Widened<Code>::count, kStep = 16 * kParts16;
  auto add = [&](int64_t k, auto&& load_x) __attribute__((always_inline)) {
    v16 in[T][kParts16];
    for (int t = 0; t < T; t++)
      for (int i = 0; i < kParts16; i++) in[t][i] = load_x(x + t * x_stride + k + 16 * i, k + 16 * i);
    for (int r = 0; r < R; r++) {
      const Widened<Code> w(rows + r * row_stride + k);
      for (int t = 0; t < T; t++)
        for (int i = 0; i < kParts16; i++) acc[r][t] = fma16(w.part[i], in[t][i], acc[r][t]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= n_inputs; k += kStep) add(k, [](const float* at, int64_t) __attribute__((always_inline)) { return load(at); });
  if (k < n_inputs)
    add(k, [&](const float* at, int64_t first) __attribute__((always_inline)) {
      return first < n_inputs ? load_tail(at, n_inputs - first < 16 ? int(n_inputs - first) : 16, 0.0f) : splat(0.0f);
    });
  for (int t = 0; t < T; t++) {
    v16 row[R];
    for (int r = 0; r < R; r++) row[r] = acc[r][t];
    sum_lanes_of<R, 8>(row, out + t * out_stride);
  }
}
template <int R, int T, class Code>
BITNET_INLINE void dot_rows(const Code* rows, int n_rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, float* out,
                            int64_t out_stride) {
  int r = 0;
  for (; r + R <= n_rows; r += R) dot_block<R, T>(rows + r * row_stride, row_stride, n_inputs, x, x_stride, out + r, out_stride);
  for (; r < n_rows; r++) dot_block<1, T>(rows + r * row_stride, row_stride, n_inputs, x, x_stride, out + r, out_stride);
}
template <class Code>
static void dot_codes(const Code* rows, int n_rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* out,
                    int64_t out_stride) {
  constexpr int T = kSums >= 16 ? 4 : 2, R = T;
  int t = 0;
  for (; t + T <= n_tokens; t += T) dot_rows<R, T>(rows, n_rows, row_stride, n_inputs, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  for (; t < n_tokens; t++) dot_rows<2 * R, 1>(rows, n_rows, row_stride, n_inputs, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

}  // namespace
