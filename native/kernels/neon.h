// What the three Arm sets share: conversions, codecs as tiles of signed bytes, and products with many tokens by those with few.
#pragma once
#include <arm_neon.h>

#include "kernels.h"

namespace {
constexpr int kLanes = 4;
}
#include "lanes.h"

namespace {
BITNET_INLINE v16 load_f16(const uint16_t* from) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) { return (FloatPart)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * p))); });
}
BITNET_INLINE void store_f16(v16 x, uint16_t* to) {
  for (int p = 0; p < 4; p++) vst1_u16(to + 4 * p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.part[p])));
}
BITNET_INLINE v16 fma16(v16 a, v16 b, v16 c) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) {
    return (FloatPart)vfmaq_f32((float32x4_t)c.part[p], (float32x4_t)a.part[p], (float32x4_t)b.part[p]);
  });
}
BITNET_INLINE void store_bytes(int8_t* to, i16x x) {  // of -128..127: the lowest byte of each lane
  const int8x16_t low = vuzp1q_s8((int8x16_t)x.part[0], (int8x16_t)x.part[1]), high = vuzp1q_s8((int8x16_t)x.part[2], (int8x16_t)x.part[3]);
  vst1q_s8(to, vuzp1q_s8(low, high));
}
constexpr int kSums = 6;  // of four registers each
}  // namespace

#include "integer_ops.h"

namespace {
BITNET_INLINE IntPart add_trits(IntPart sum, Words codes, Words x) {
#ifdef __ARM_FEATURE_DOTPROD
  return (IntPart)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
#else  // the sums of pairs are at most 2 * 2 * 128
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)codes), vget_low_s8((int8x16_t)x)), high = vmull_high_s8((int8x16_t)codes, (int8x16_t)x);
  return (IntPart)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
}
BITNET_INLINE i16x add_pairs(i16x sum, i16x a, i16x b) {
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) {
    const int16x8_t x = (int16x8_t)a.part[p], y = (int16x8_t)b.part[p];
    return sum.part[p] + (IntPart)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
  });
}
BITNET_INLINE int32_t sum_part(IntPart x) { return vaddvq_s32((int32x4_t)x); }
BITNET_INLINE Words low_bytes(Words a, Words b) { return (Words)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b); }
BITNET_INLINE Words high_bytes(Words a, Words b) { return (Words)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b); }
BITNET_INLINE Words low_words(Words a, Words b) { return (Words)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
BITNET_INLINE Words high_words(Words a, Words b) { return (Words)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
}  // namespace

#include "line_ops.h"

namespace {
// A codec of Arm: how a register of packed bytes (4 rows, see kernels.h) becomes tiles of signed bytes.
//   tiles              in a vector
//   top                |weight| of a tile's bytes is at most this
//   offset             tile = code - offset
//   tile<s, in_place>  tile s; in place it may come times 2^shift(s), for one instruction less: 0, 2, .. 2 (factors - 1)
struct TwoBitTiles {
  static constexpr int tiles = 4, top = 2, offset = 0, factors = 3;
  static constexpr int shift(int s) { return s == 3 ? 0 : 2 * s; }
  template <int s, bool in_place>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) {  // the top pair in place would be negative: it is shifted, and needs no mask
    if constexpr (s == 3) return vreinterpretq_s8_u8(vshrq_n_u8(packed, 6));
    else if constexpr (s == 0 || in_place) return vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(3 << 2 * s)));
    else return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(packed, 2 * s), vdupq_n_u8(3)));
  }
};
struct Int4Tiles {
  static constexpr int tiles = 2, top = 15, offset = 0, factors = 1;
  static constexpr int shift(int) { return 0; }
  template <int s, bool>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) {
    return vreinterpretq_s8_u8(s ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15)));
  }
};
BITNET_INLINE uint8x16_t fp4_bytes(uint8x16_t numbers) { return vqtbl1q_u8(vld1q_u8(bitnet::kFp4Codes), numbers); }
BITNET_INLINE Words fp4_codes(Words numbers) { return (Words)fp4_bytes((uint8x16_t)numbers); }
struct Fp4Tiles {
  static constexpr int tiles = 2, top = 24, offset = 0, factors = 1;
  static constexpr int shift(int) { return 0; }
  template <int s, bool>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) {
    return vreinterpretq_s8_u8(fp4_bytes(s ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15))));
  }
};
struct Int8Tiles {  // codes of 128 and more are no signed bytes
  static constexpr int tiles = 1, top = 128, offset = 128, factors = 1;
  static constexpr int shift(int) { return 0; }
  template <int, bool>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) { return vreinterpretq_s8_u8(veorq_u8(packed, vdupq_n_u8(128))); }
};
template <int largest>
struct UnpackedTiles {
  static constexpr int tiles = 1, top = largest, offset = 0, factors = 1;
  static constexpr int shift(int) { return 0; }
  template <int, bool>
  BITNET_INLINE int8x16_t tile(uint8x16_t packed) { return vreinterpretq_s8_u8(packed); }
};

// Calls work(Count<0>()), work(Count<1>()), ...: intrinsics want their lanes as constants.
template <int N, class Work>
BITNET_INLINE void unroll(const Work& work) {
  if constexpr (N > 0) unroll<N - 1>(work), work(Count<N - 1>());
}
#define BITNET_STEP [&](auto index) __attribute__((always_inline))

// A step is 16 inputs, which are one register of activations: 4 tiles, so 4 / Tiles::tiles vectors. Tile s of 4 rows:
template <class Tiles, int s, bool in_place>
BITNET_INLINE int8x16_t step_tile(const uint8_t* at) {
  return Tiles::template tile<s % Tiles::tiles, in_place>(vld1q_u8(at + 64 * (s / Tiles::tiles)));
}
template <class Tiles>
BITNET_INLINE void prefetch_step(const uint8_t* at) {
  for (int v = 0; v < 4 / Tiles::tiles; v++) prefetch(at + 64 * v);
}
// A codec of integer_ops.h by a set's products of whole steps,
//   template <int T> static void run(const uint8_t* codes, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots)
// the sums of tile * x. Codes that end within a step are copied, and zero follows them.
template <template <class> class Steps, class Tiles>
struct Products {
  template <int T>
  static __attribute__((noinline)) void run(const uint8_t* codes, int64_t n_steps, const int8_t* x, int64_t x_stride, i16x* dots) {
    Steps<Tiles>::template run<T>(codes, n_steps, x, x_stride, dots);
  }
  template <int T>
  static __attribute__((noinline)) void add_last_step(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    alignas(64) uint8_t step[256] = {};
    for (int64_t i = 0; i < 64 * n_vectors; i++) step[i] = codes[i];
    i16x last[T];
    run<T>(step, 1, x, x_stride, last);
    for (int t = 0; t < T; t++) dots[t] += last[t];
  }
  template <int T>
  BITNET_INLINE void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    constexpr int kVectors = 4 / Tiles::tiles;
    const int64_t steps = n_vectors / kVectors, rest = n_vectors % kVectors;
    Steps<Tiles>::template run<T>(codes, steps, x, x_stride, dots);
    if (rest) add_last_step<T>(codes + 64 * kVectors * steps, rest, x + 16 * steps, x_stride, dots);
    if constexpr (Tiles::offset)
      for (int t = 0; t < T; t++) {
        int32x4_t sum = {};
        for (int64_t i = 0; i < steps + (rest > 0); i++) sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(x + t * x_stride + 16 * i)));
        dots[t] += splat_int(Tiles::offset * vaddvq_s32(sum));
      }
  }
};

// The products of unpacked codes with many tokens, T at a time.
template <class Dot>
static void gemm_by(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride, int n_tokens,
                    bool first, bool, int32_t* out) {
  auto some = [&](auto count, int p, int t) {
    i16x dots[decltype(count)::count];
    Dot::template dot<decltype(count)::count>(codes + p * panel_bytes, inputs / 4, x + t * x_stride, x_stride, dots);
    for (int i = 0; i < decltype(count)::count; i++) {
      int32_t* to = out + (p * kGemmTokens + t + i) * 16;
      store_int(to, first ? dots[i] : load_int(to) + dots[i]);
    }
  };
  for (int p = 0; p < n_panels; p++) {
    int t = 0;
    for (; t + 8 <= n_tokens; t += 8) some(Count<8>(), p, t);
    if (t + 4 <= n_tokens) some(Count<4>(), p, t), t += 4;
    if (t + 2 <= n_tokens) some(Count<2>(), p, t), t += 2;
    if (t < n_tokens) some(Count<1>(), p, t);
  }
}
}  // namespace
