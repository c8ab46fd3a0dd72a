// NEON with matrix products of bytes (i8mm: Armv8.6, since 2020): one instruction multiplies 2 rows x 8 inputs by 8 inputs x 2 tokens. Two tiles,
// of 4 inputs each, are zipped for it. One token or two gain nothing by that and are multiplied by dot products.
#include "neondotprod.cpp"

namespace {
struct WholeTiles {  // int8 as it is: there are products of unsigned codes
  static constexpr int tiles = 1, top = 255, offset = 0, factors = 1;
  static constexpr int shift(int) { return 0; }
  template <int, bool>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) { return vreinterpretq_s8_u8(packed); }
};
// sum [2 rows, 2 tokens] += rows [2, 8] * tokens [2, 8]
template <class Tiles>
BITNET_INLINE int32x4_t add_matrix(int32x4_t sum, int8x16_t rows, int8x16_t tokens) {
  return Tiles::top > 128 ? vusmmlaq_s32(sum, vreinterpretq_u8_s8(rows), tokens) : vmmlaq_s32(sum, rows, tokens);
}
BITNET_INLINE int8x16_t zip_halves(int8x16_t a, int8x16_t b, bool high) {  // the first or last 8 inputs of two tokens
  const int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
  return vreinterpretq_s8_s64(high ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
}
BITNET_INLINE int8x16_t zip_tiles(int8x16_t a, int8x16_t b, bool high) {  // the first or last 2 of 4 rows, 8 inputs each
  const int32x4_t x = vreinterpretq_s32_s8(a), y = vreinterpretq_s32_s8(b);
  return vreinterpretq_s8_s32(high ? vzip2q_s32(x, y) : vzip1q_s32(x, y));
}

// T tokens x R registers of 4 rows, in sums of 2 x 2.
template <class Tiles>
struct Steps {
  template <int T, int R>
  BITNET_INLINE void rows(const uint8_t* codes, int r0, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    int32x4_t acc[T / 2][R][2] = {};
    constexpr int kBytes = 64 * 4 / Tiles::tiles;
    for (const uint8_t* end = codes + kBytes * n_steps; codes != end; codes += kBytes, x += 16) {
      if (r0 == 0) prefetch_step<Tiles>(codes);
      int8x16_t quads[T];
      for (int t = 0; t < T; t++) quads[t] = vld1q_s8(x + t * x_stride);
      unroll<2>(BITNET_STEP {
        constexpr int half = decltype(index)::count;
        for (int r = 0; r < R; r++) {
          const uint8_t* at = codes + 16 * (r0 + r);
          const int8x16_t a = step_tile<Tiles, 2 * half, false>(at), b = step_tile<Tiles, 2 * half + 1, false>(at);
          for (int t = 0; t < T; t += 2)
            for (int h = 0; h < 2; h++) acc[t / 2][r][h] = add_matrix<Tiles>(acc[t / 2][r][h], zip_tiles(a, b, h), zip_halves(quads[t], quads[t + 1], half));
        }
      });
    }
    for (int t = 0; t < T; t += 2)
      for (int r = 0; r < R; r++) {
        dots[t].part[r0 + r] = (IntPart)vuzp1q_s32(acc[t / 2][r][0], acc[t / 2][r][1]);
        dots[t + 1].part[r0 + r] = (IntPart)vuzp2q_s32(acc[t / 2][r][0], acc[t / 2][r][1]);
      }
  }

  template <int T>
  BITNET_INLINE void run(const uint8_t* codes, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    if constexpr (T < 4) return DotSteps<Tiles>::template run<T>(codes, n_steps, x, x_stride, dots);
    constexpr int R = T == 4 ? 4 : 2;
    for (int r = 0; r < 4; r += R) rows<T, R>(codes, r, n_steps, x, x_stride, dots);
  }
};
using TwoBit = Products<Steps, TwoBitTiles>;
using Int4 = Products<Steps, Int4Tiles>;
using Int8 = Products<Steps, WholeTiles>;
using Fp4 = Products<Steps, Fp4Tiles>;
using Base3 = UnpackedBase3<Int8>;
using Binary = UnpackedBinary<Int8>;

// Many tokens: both sides are zipped once, kPart inputs at a time, and then meet in blocks of 8 rows x 2 P tokens.
constexpr int kPart = 320, kPairs = kGemmTokens / 2;
struct Zipped {
  int8x16_t codes[kPart / 8][8];    // [step of 8 inputs][pair of rows]
  int8x16_t tokens[kPart / 8][kPairs];
};
template <int P>
BITNET_INLINE void gemm_block(const Zipped& z, int half, int pair, int64_t steps, bool first, int32_t* out /* [2 P, 16] */) {
  int32x4_t acc[P][4];
  for (int p = 0; p < P; p++)
    for (int r = 0; r < 4; r++) {
      const int32_t* at = out + 32 * p + 4 * (r / 2);
      const int32x4_t a = first ? int32x4_t{} : vld1q_s32(at), b = first ? int32x4_t{} : vld1q_s32(at + 16);
      acc[p][r] = r % 2 ? vzip2q_s32(a, b) : vzip1q_s32(a, b);
    }
  for (int64_t k = 0; k < steps; k++)
    for (int p = 0; p < P; p++)
      for (int r = 0; r < 4; r++) acc[p][r] = add_matrix<WholeTiles>(acc[p][r], z.codes[k][4 * half + r], z.tokens[k][pair + p]);
  for (int p = 0; p < P; p++)
    for (int r = 0; r < 4; r += 2) {
      vst1q_s32(out + 32 * p + 2 * r, vuzp1q_s32(acc[p][r], acc[p][r + 1]));
      vst1q_s32(out + 32 * p + 2 * r + 16, vuzp2q_s32(acc[p][r], acc[p][r + 1]));
    }
}
static void gemm(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens,
                 bool first, bool, int32_t* out) {
  Zipped z;
  const int pairs = (n_tokens + 1) / 2;  // of an odd number the last one's second token is read and written too, and means nothing
  for (int64_t k0 = 0; k0 < inputs; k0 += kPart, first = false) {
    const int64_t part = inputs - k0 < kPart ? inputs - k0 : kPart;
    for (int pair = 0; pair < pairs; pair++)
      for (int64_t k = 0; k < part; k += 16) {
        const int8_t* at = x + 2 * pair * x_stride + k0 + k;
        const int8x16_t a = vld1q_s8(at), b = vld1q_s8(at + x_stride);
        for (int h = 0; h < 2; h++) z.tokens[k / 8 + h][pair] = zip_halves(a, b, h);
      }
    for (int p = 0; p < n_panels; p++) {
      for (int64_t k = 0; k < part; k += 8)
        for (int r = 0; r < 8; r++) {
          const uint8_t* at = codes + p * panel_bytes + 16 * (k0 + k) + 16 * (r / 2);
          z.codes[k / 8][r] = zip_tiles(step_tile<WholeTiles, 0, false>(at), step_tile<WholeTiles, 1, false>(at), r % 2);
        }
      for (int half = 0; half < 2; half++) {
        int32_t* to = out + p * kGemmTokens * 16 + 8 * half;
        int pair = 0;
        for (; pair + 4 <= pairs; pair += 4) gemm_block<4>(z, half, pair, part / 8, first, to + 32 * pair);
        for (; pair < pairs; pair++) gemm_block<1>(z, half, pair, part / 8, first, to + 32 * pair);
      }
    }
  }
}
}  // namespace

namespace bitnet {
const Kernels kNeonI8mm = BITNET_KERNELS("neoni8mm", 8, Base3Digits, unpack_b3, gemm, gemm, gemm, gemm);
}
