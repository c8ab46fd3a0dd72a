// NEON with dot products (Armv8.2, since 2018): one instruction multiplies 16 codes by 16 activations and adds them by fours.
#include "neon.h"

namespace {
// sum += tile * four activations, by fours
template <class Tiles, int quad>
BITNET_INLINE int32x4_t add_products(int32x4_t sum, int8x16_t tile, int8x16_t x) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  if constexpr (Tiles::top > 128) return vusdotq_laneq_s32(sum, vreinterpretq_u8_s8(tile), x, quad);
#endif
  return vdotq_laneq_s32(sum, tile, x, quad);
}

// T tokens x R registers of 4 rows. For one token the codes stay where they are in their bytes, and the factors 1, 4, 16 leave with the sums.
template <class Tiles>
struct DotSteps {
  static constexpr int kBytes = 64 * 4 / Tiles::tiles;

  // Rows 4 r0 .. 4 (r0 + R) of a panel.
  template <int T, int R>
  BITNET_INLINE void rows(const uint8_t* codes, int r0, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr bool kInPlace = T == 1;
    constexpr int N = kInPlace ? Tiles::factors : 1;
    int32x4_t acc[T][R][N] = {};
    for (const uint8_t* end = codes + kBytes * n_steps; codes != end; codes += kBytes, x += 16) {
      if (r0 == 0) prefetch_step<Tiles>(codes);
      int8x16_t quads[T];
      for (int t = 0; t < T; t++) quads[t] = vld1q_s8(x + t * x_stride);
      unroll<4>(BITNET_STEP {
        constexpr int s = decltype(index)::count, n = kInPlace ? Tiles::shift(s % Tiles::tiles) / 2 : 0;
        for (int r = 0; r < R; r++) {
          const int8x16_t c = step_tile<Tiles, s, kInPlace>(codes + 16 * (r0 + r));
          for (int t = 0; t < T; t++) acc[t][r][n] = add_products<Tiles, s>(acc[t][r][n], c, quads[t]);
        }
      });
    }
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) {
        int32x4_t sum = acc[t][r][0];
        for (int n = 1; n < N; n++) sum += acc[t][r][n] >> 2 * n;
        dots[t].part[r0 + r] = (IntPart)sum;
      }
  }

  template <int T>
  BITNET_INLINE void run(const uint8_t* codes, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int R = T <= 4 ? 4 : 2;
    for (int r = 0; r < 4; r += R) rows<T, R>(codes, r, n_steps, x, x_stride, dots);
  }
};
}  // namespace

#ifndef __ARM_FEATURE_MATMUL_INT8  // neoni8mm.cpp
namespace {
using TwoBit = Products<DotSteps, TwoBitTiles>;
using Int4 = Products<DotSteps, Int4Tiles>;
using Int8 = Products<DotSteps, Int8Tiles>;
using Fp4 = Products<DotSteps, Fp4Tiles>;
using Tile = Products<DotSteps, UnpackedTiles<24>>;
using Base3 = UnpackedBase3<Tile>;
using Binary = UnpackedBinary<Tile>;
}  // namespace

namespace bitnet {
const Kernels kNeonDotprod = BITNET_KERNELS("neondotprod", 8, Base3Digits, unpack_b3, gemm_by<Tile>, gemm_by<Tile>, gemm_by<Tile>, gemm_by<Int8>);
}
#endif
