// The kernels in plain C++: the reference of the others on any CPU, and what runs where no vector set is known.
#include "kernels.h"

namespace {
constexpr int kLanes = 4;

}
#include "lanes.h"

namespace {
static float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  union { uint32_t u; float f; } x;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact
    x.f = (float)fraction * 5.9604644775390625e-8f;
    x.u |= sign;
  } else if (exponent == 31) {  // infinity, and NaN made quiet as the hardware does
    x.u = sign | 0x7f800000 | (fraction << 13) | (fraction ? 0x400000 : 0);
  } else {
    x.u = sign | ((exponent + 112) << 23) | (fraction << 13);
  }
  return x.f;
}

static uint16_t to_half(float f) {  // round half to even
  union { float f; uint32_t u; } x = {f};
  uint32_t sign = (x.u >> 16) & 0x8000, u = x.u & 0x7fffffff;
  if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((u >> 13) & 0x3ff));
  if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and above
  if (u < 0x38800000) {                                   // below 2^-14: adding 0.5 leaves f / 2^-24, rounded, in the low bits
    union { float f; uint32_t u; } y = {0};
    y.u = u;
    y.f += 0.5f;
    return (uint16_t)(sign | (y.u - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);  // may carry into infinity at 65520, as it should
  return (uint16_t)(sign | ((u - 0x38000000) >> 13));
}

BITNET_INLINE v16 load_f16(const uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; i++) x[i] = from_half(p[i]);
  return load(x);
}
BITNET_INLINE void store_f16(v16 x, uint16_t* p) {
  for (int i = 0; i < 16; i++) p[i] = to_half(x[i]);
}
// In double the product is exact; the sum is rounded to odd, so that rounding it to float rounds once (ternary.py, fused_multiply_add).
BITNET_INLINE v16 fma16(v16 a, v16 b, v16 c) {
  float x[16];
  for (int i = 0; i < 16; i++) {
    const double product = (double)a[i] * b[i], addend = c[i];
    union { double d; int64_t u; } sum = {product + addend}, error;
    const double part = sum.d - product;
    error.d = (product - (sum.d - part)) + (addend - part);
    if ((error.d < 0 || error.d > 0) && !(sum.u & 1)) sum.u += (sum.u ^ error.u) < 0 ? -1 : 1;  // away from zero if the signs agree
    x[i] = (float)sum.d;
  }
  return load(x);
}
BITNET_INLINE void store_bytes(int8_t* to, i16x x) {
  for (int i = 0; i < 16; i++) to[i] = (int8_t)x[i];
}
constexpr int kSums = 6;

constexpr bitnet::GemmInteger no_gemm = nullptr;  // many tokens go through multiply_* in blocks
}  // namespace

#include "integer_ops.h"

namespace {
BITNET_INLINE IntPart add_trits(IntPart sum, Words codes, Words x) {
  int8_t bytes[2][16];
  store_words((uint8_t*)bytes[0], codes), store_words((uint8_t*)bytes[1], x);
  for (int i = 0; i < 16; i++) sum[i / 4] += bytes[0][i] * bytes[1][i];
  return sum;
}
BITNET_INLINE i16x add_pairs(i16x sum, i16x a, i16x b) {
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) {
    const IntPart x = a.part[p], y = b.part[p];
    return sum.part[p] + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
  });
}
BITNET_INLINE int32_t sum_part(IntPart x) { return (x[0] + x[1]) + (x[2] + x[3]); }
typedef uint8_t SixteenBytes __attribute__((vector_size(16)));
BITNET_INLINE Words low_bytes(Words a, Words b) {
  return (Words)__builtin_shufflevector((SixteenBytes)a, (SixteenBytes)b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
BITNET_INLINE Words high_bytes(Words a, Words b) {
  return (Words)__builtin_shufflevector((SixteenBytes)a, (SixteenBytes)b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
BITNET_INLINE Words low_words(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
BITNET_INLINE Words high_words(Words a, Words b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
}  // namespace

#include "line_ops.h"

namespace {
BITNET_INLINE Words fp4_codes(Words numbers) {
  for (int i = 0; i < kPartBytes / 2; i++) numbers[i] = (uint16_t)(bitnet::kFp4Codes[numbers[i] & 15] | bitnet::kFp4Codes[numbers[i] >> 8] << 8);
  return numbers;
}
// A vector of Tiles tiles; digit(byte, s) is the code of tile s.
template <int Tiles, int (*digit)(int, int)>
struct Bytes {
  template <int T>
  static void dot(const uint8_t* codes, int64_t n_vectors, const int8_t* x, int64_t x_stride, i16x* dots) {
    for (int t = 0; t < T; t++, x += x_stride) {
      int32_t sums[16] = {};
      for (int64_t v = 0; v < n_vectors; v++)
        for (int s = 0; s < Tiles; s++)
          for (int r = 0; r < 16; r++)
            for (int i = 0; i < 4; i++) sums[r] += digit(codes[64 * v + 4 * r + i], s) * x[4 * (Tiles * v + s) + i];
      dots[t] = load_int(sums);
    }
  }
};
static int two_bits(int byte, int s) { return (byte >> (2 * s)) & 3; }
static int base3_digit(int byte, int s) {
  const int low = byte % 64, l = low % 9, h = byte / 64 * 7 + low / 9;
  return s == 0 ? l % 3 : s == 1 ? l / 3 : s == 2 ? h % 3 : s == 3 ? h / 3 % 3 : h / 9;
}
static int nibble(int byte, int s) { return (byte >> (4 * s)) & 15; }
static int fp4(int byte, int s) { return bitnet::kFp4Codes[nibble(byte, s)]; }
static int bit(int byte, int s) { return (byte >> s & 1) * 2; }
static int whole(int byte, int) { return byte; }
using TwoBit = Bytes<4, two_bits>;
using Base3 = Bytes<5, base3_digit>;
using Binary = Bytes<8, bit>;
using Int4 = Bytes<2, nibble>;
using Fp4 = Bytes<2, fp4>;
using Int8 = Bytes<1, whole>;
}  // namespace

namespace bitnet {
const Kernels kScalar = BITNET_KERNELS("scalar", 8, Base3Digits, unpack_b3, no_gemm, no_gemm, no_gemm, no_gemm);
}
