// NEON as every 64-bit Arm has it: products of bytes in 16 bits, eight at a time.
#include "neon.h"

namespace {
// T tokens x R registers of 4 rows. A 16-bit sum takes one product from each tile, none beyond 128 * top, and is widened every kSteps steps,
// after 4 * kSteps * 128 * top < 2^15. Two products of int8 can reach 2^15, so each is widened at once.
template <class Tiles>
struct Steps {
  static constexpr int kSteps = 32767 / (4 * 128 * Tiles::top);  // 31 for ternary codes, 4 for int4, 0 for int8
  static constexpr int kBytes = 64 * 4 / Tiles::tiles;

  template <int T, int R>
  BITNET_INLINE void add_step(const uint8_t* at, const int8_t* x, int64_t x_stride, int16x8_t (&acc)[T][R][2], int32x4_t (&wide)[T][R][2]) {
    int8x16_t quads[T];
    for (int t = 0; t < T; t++) quads[t] = vld1q_s8(x + t * x_stride);
    unroll<4>(BITNET_STEP {
      constexpr int s = decltype(index)::count;
      int8x16_t xs[T];
      for (int t = 0; t < T; t++) xs[t] = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(quads[t]), s));
      for (int r = 0; r < R; r++) {
        const int8x16_t c = step_tile<Tiles, s, false>(at + 16 * r);
        for (int t = 0; t < T; t++)
          if constexpr (kSteps > 0) {
            acc[t][r][0] = vmlal_s8(acc[t][r][0], vget_low_s8(c), vget_low_s8(xs[t]));
            acc[t][r][1] = vmlal_high_s8(acc[t][r][1], c, xs[t]);
          } else {
            wide[t][r][0] = vpadalq_s16(wide[t][r][0], vmull_s8(vget_low_s8(c), vget_low_s8(xs[t])));
            wide[t][r][1] = vpadalq_s16(wide[t][r][1], vmull_high_s8(c, xs[t]));
          }
      }
    });
  }

  // Rows 4 r0 .. 4 (r0 + R) of a panel.
  template <int T, int R>
  BITNET_INLINE void rows(const uint8_t* codes, int r0, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    int32x4_t wide[T][R][2] = {};
    constexpr int64_t kBatch = kSteps > 0 ? kSteps : int64_t{1} << 40;
    while (n_steps > 0) {
      const int64_t n = n_steps < kBatch ? n_steps : kBatch;
      int16x8_t acc[T][R][2] = {};
      for (const uint8_t* end = codes + kBytes * n; codes != end; codes += kBytes, x += 16) {
        if (r0 == 0) prefetch_step<Tiles>(codes);
        add_step<T, R>(codes + 16 * r0, x, x_stride, acc, wide);
      }
      if constexpr (kSteps > 0)
        for (int t = 0; t < T; t++)
          for (int r = 0; r < R; r++)
            for (int h = 0; h < 2; h++) wide[t][r][h] = vpadalq_s16(wide[t][r][h], acc[t][r][h]);
      n_steps -= n;
    }
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) dots[t].part[r0 + r] = (IntPart)vpaddq_s32(wide[t][r][0], wide[t][r][1]);
  }

  template <int T>
  BITNET_INLINE void run(const uint8_t* codes, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int kTokens = T < 4 ? T : 4, R = kTokens == 1 ? 4 : (kSteps > 0 ? 8 : 4) / kTokens;
    for (int t = 0; t < T; t += kTokens)
      for (int r = 0; r < 4; r += R) rows<kTokens, R>(codes, r, n_steps, x + t * x_stride, x_stride, dots + t);
  }
};
using TwoBit = Products<Steps, TwoBitTiles>;
using Int4 = Products<Steps, Int4Tiles>;
using Int8 = Products<Steps, Int8Tiles>;
using Trits = Products<Steps, UnpackedTiles<2>>;
using Nibbles = Products<Steps, UnpackedTiles<15>>;
using Fp4 = Products<Steps, Fp4Tiles>;
using Fp4Codes = Products<Steps, UnpackedTiles<24>>;
using Base3 = UnpackedBase3<Trits>;
using Binary = UnpackedBinary<Trits>;
}  // namespace

namespace bitnet {
const Kernels kNeon = BITNET_KERNELS("neon", 8, Base3Digits, unpack_b3, gemm_by<Trits>, gemm_by<Nibbles>, gemm_by<Fp4Codes>, gemm_by<Int8>);
}
