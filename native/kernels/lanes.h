// Sixteen lanes of floats and of integers, in as many registers as the instruction set needs: kLanes to a register, which the including
// file defines. A vector of 64 bytes in one piece would do the same, but gcc keeps what is wider than its registers in memory.
#pragma once
#include <stdint.h>

namespace {

#define BITNET_INLINE static inline __attribute__((always_inline))
constexpr int kParts = 16 / kLanes;
typedef float FloatPart __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IntPart __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
constexpr int kPartBytes = 4 * kLanes;

// An operation on every part, spelled out: loops over parts would be unrolled too late to keep them in registers.
template <class Vector, class Op>
BITNET_INLINE Vector for_parts(Op op) {
  if constexpr (kParts == 1) return {{op(0)}};
  else if constexpr (kParts == 2) return {{op(0), op(1)}};
  else return {{op(0), op(1), op(2), op(3)}};
}

struct i16x {
  IntPart part[kParts];
  int32_t operator[](int lane) const { return part[lane / kLanes][lane % kLanes]; }
};
struct v16 {
  FloatPart part[kParts];
  float operator[](int lane) const { return part[lane / kLanes][lane % kLanes]; }
};

#define BITNET_OP(Vector, Element, Part, op)                                                                                           \
  BITNET_INLINE Vector operator op(Vector a, Vector b) {                                                                               \
    return for_parts<Vector>([&](int p) __attribute__((always_inline)) { return a.part[p] op b.part[p]; });                            \
  }                                                                                                                                    \
  BITNET_INLINE Vector operator op(Vector a, Element b) {                                                                              \
    return for_parts<Vector>([&](int p) __attribute__((always_inline)) { return a.part[p] op b; });                                    \
  }
BITNET_OP(v16, float, FloatPart, +)
BITNET_OP(v16, float, FloatPart, -)
BITNET_OP(v16, float, FloatPart, *)
BITNET_OP(v16, float, FloatPart, /)
BITNET_OP(i16x, int32_t, IntPart, +)
BITNET_OP(i16x, int32_t, IntPart, -)
BITNET_OP(i16x, int32_t, IntPart, &)
BITNET_OP(i16x, int32_t, IntPart, <<)
BITNET_OP(i16x, int32_t, IntPart, >>)
#undef BITNET_OP
BITNET_INLINE v16 operator-(v16 x) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) { return -x.part[p]; });
}
BITNET_INLINE v16& operator+=(v16& a, v16 b) { return a = a + b; }
BITNET_INLINE i16x& operator+=(i16x& a, i16x b) { return a = a + b; }

// Masks are all ones or zero in every lane.
#define BITNET_COMPARE(Vector, op)                                                                                                     \
  BITNET_INLINE i16x operator op(Vector a, Vector b) {                                                                                 \
    return for_parts<i16x>([&](int p) __attribute__((always_inline)) { return IntPart(a.part[p] op b.part[p]); });                     \
  }
BITNET_COMPARE(v16, <)
BITNET_COMPARE(v16, >)
BITNET_COMPARE(v16, >=)
BITNET_COMPARE(i16x, <)
BITNET_COMPARE(i16x, >)
#undef BITNET_COMPARE
template <class Vector>
BITNET_INLINE Vector select(i16x mask, Vector yes, Vector no) {
  return for_parts<Vector>([&](int p) __attribute__((always_inline)) { return mask.part[p] ? yes.part[p] : no.part[p]; });
}

BITNET_INLINE v16 splat(float x) {
  return for_parts<v16>([&](int) __attribute__((always_inline)) { return x - FloatPart{}; });  // exact, -0 too
}
BITNET_INLINE i16x splat_int(int32_t x) {
  return for_parts<i16x>([&](int) __attribute__((always_inline)) { return IntPart{} + x; });
}
BITNET_INLINE v16 load(const float* from) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) { return *reinterpret_cast<const FloatPart*>(from + kLanes * p); });
}
BITNET_INLINE i16x load_int(const int32_t* from) {
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) { return *reinterpret_cast<const IntPart*>(from + kLanes * p); });
}
BITNET_INLINE void store(float* to, v16 x) {
  for (int p = 0; p < kParts; p++) *reinterpret_cast<FloatPart*>(to + kLanes * p) = x.part[p];
}
BITNET_INLINE void store_int(int32_t* to, i16x x) {
  for (int p = 0; p < kParts; p++) *reinterpret_cast<IntPart*>(to + kLanes * p) = x.part[p];
}
BITNET_INLINE v16 to_float(i16x x) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) { return __builtin_convertvector(x.part[p], FloatPart); });
}
// The same bits.
BITNET_INLINE v16 as_float(i16x x) {
  return for_parts<v16>([&](int p) __attribute__((always_inline)) { return FloatPart(x.part[p]); });
}
BITNET_INLINE i16x as_int(v16 x) {
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) { return IntPart(x.part[p]); });
}
// Lane l gets lane l ^ Bit, a power of two below 16.
template <int Bit>
BITNET_INLINE v16 swap_lanes(v16 x) {
  if constexpr (Bit >= kLanes) return for_parts<v16>([&](int p) __attribute__((always_inline)) { return x.part[p ^ (Bit / kLanes)]; });
  else
    return for_parts<v16>([&](int p) __attribute__((always_inline)) {
      FloatPart y = x.part[p];
      if constexpr (kLanes == 16) return __builtin_shufflevector(y, y, 0 ^ Bit, 1 ^ Bit, 2 ^ Bit, 3 ^ Bit, 4 ^ Bit, 5 ^ Bit, 6 ^ Bit, 7 ^ Bit, 8 ^ Bit, 9 ^ Bit, 10 ^ Bit, 11 ^ Bit, 12 ^ Bit, 13 ^ Bit, 14 ^ Bit, 15 ^ Bit);
      else if constexpr (kLanes == 8) return __builtin_shufflevector(y, y, 0 ^ Bit, 1 ^ Bit, 2 ^ Bit, 3 ^ Bit, 4 ^ Bit, 5 ^ Bit, 6 ^ Bit, 7 ^ Bit);
      else return __builtin_shufflevector(y, y, 0 ^ Bit, 1 ^ Bit, 2 ^ Bit, 3 ^ Bit);
    });
}
// From a narrower type, 16 in memory.
template <class Narrow>
BITNET_INLINE i16x widen_int(const Narrow* from) {
  typedef Narrow Part __attribute__((vector_size(sizeof(Narrow) * kLanes), aligned(1), may_alias));
  return for_parts<i16x>([&](int p) __attribute__((always_inline)) {
    return __builtin_convertvector(*reinterpret_cast<const Part*>(from + kLanes * p), IntPart);
  });
}

// All lanes together, by halves where one register holds them: for what is the same in any order, the largest of numbers or a sum of integers.
template <class Vector, class Both> BITNET_INLINE auto fold_lanes(Vector v, Both both) {
  auto x = v.part[0];
  for (int p = 1; p < kParts; p++) x = both(x, v.part[p]);
  if constexpr (kLanes == 16) {
    x = both(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = both(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = both(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = both(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
  } else {
    auto all = x[0];
    for (int l = 1; l < kLanes; l++) all = both(all, x[l]);
    return all;
  }
}

}  // namespace
