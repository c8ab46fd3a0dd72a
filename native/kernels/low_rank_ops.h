// The two products of a low-rank adapter (kernels.h: AddI16, DotI16), written once for every instruction set.
#pragma once
#include "float_ops.h"

namespace {

// 32 integers of 16 bits as floats times 2^16: the lower halves of 16 lanes, and the upper ones.
struct Widened {
  v16 lower, upper;
};
BITNET_INLINE Widened load_i16(const int16_t* from) {
  const i16x both = load_int(reinterpret_cast<const int32_t*>(from));
  return {to_float(both << 16), to_float(both & int32_t(0xffff0000))};
}
// An adapter's B: panels of few inputs. N: n_inputs where that is known, so that the loop is unrolled; else 0.
template <int N, int T>
BITNET_INLINE void add_panels(const int16_t* w, int n_rows, int64_t n_inputs, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  if (N) n_inputs = N;
  for (int row = 0; row < n_rows; row += 16) {
    v16 acc[T][4];
    for (int t = 0; t < T; t++)
      for (int j = 0; j < 4; j++) acc[t][j] = splat(0.0f);
    for (int64_t k = 0; k < n_inputs; k += 4)
      for (int j = 0; j < 4; j += 2, w += 32) {
        __builtin_prefetch(w + 1024, 0, 3);
        const Widened wide = load_i16(w);
        for (int t = 0; t < T; t++) {
          const float* in = x + t * x_stride + k + j;
          acc[t][j] = fma16(wide.lower, splat(in[0]), acc[t][j]), acc[t][j + 1] = fma16(wide.upper, splat(in[1]), acc[t][j + 1]);
        }
      }
    for (int t = 0; t < T; t++) {
      const v16 sum = (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]);
      float* to = y + t * y_stride + row;
      if (row + 16 <= n_rows) store(to, load(to) + sum);
      else store_tail(to, n_rows - row, load_tail(to, n_rows - row, 0.0f) + sum);
    }
  }
}
static void add_i16(const int16_t* panels, int n_rows, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* y, int64_t y_stride) {
  constexpr int kFew = 16 <= kSums ? 4 : 1;
  int t = 0;
  for (; t + kFew <= n_tokens; t += kFew) add_panels<0, kFew>(panels, n_rows, n_inputs, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  for (; t < n_tokens; t++)
    if (n_inputs == 8) add_panels<8, 1>(panels, n_rows, n_inputs, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
    else add_panels<0, 1>(panels, n_rows, n_inputs, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
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
// An adapter's A: R rows x T tokens in registers.
template <int R, int T>
BITNET_INLINE void dot_block(const int16_t* rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  v16 acc[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = splat(0.0f);
  auto add = [&](int64_t k, auto&& load_x) __attribute__((always_inline)) {
    v16 lower[T], upper[T];
    for (int t = 0; t < T; t++) lower[t] = load_x(x + t * x_stride + k, k), upper[t] = load_x(x + t * x_stride + k + 16, k + 16);
    for (int r = 0; r < R; r++) {
      const Widened w = load_i16(rows + r * row_stride + k);
      for (int t = 0; t < T; t++) acc[r][t] = fma16(w.upper, upper[t], fma16(w.lower, lower[t], acc[r][t]));
    }
  };
  int64_t k = 0;
  for (; k + 32 <= n_inputs; k += 32) add(k, [](const float* at, int64_t) __attribute__((always_inline)) { return load(at); });
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
template <int R, int T>
BITNET_INLINE void dot_rows(const int16_t* rows, int n_rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, float* out,
                            int64_t out_stride) {
  int r = 0;
  for (; r + R <= n_rows; r += R) dot_block<R, T>(rows + r * row_stride, row_stride, n_inputs, x, x_stride, out + r, out_stride);
  for (; r < n_rows; r++) dot_block<1, T>(rows + r * row_stride, row_stride, n_inputs, x, x_stride, out + r, out_stride);
}
static void dot_i16(const int16_t* rows, int n_rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* out,
                    int64_t out_stride) {
  constexpr int T = kSums >= 16 ? 4 : 2, R = T;
  int t = 0;
  for (; t + T <= n_tokens; t += T) dot_rows<R, T>(rows, n_rows, row_stride, n_inputs, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  for (; t < n_tokens; t++) dot_rows<2 * R, 1>(rows, n_rows, row_stride, n_inputs, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

}  // namespace
