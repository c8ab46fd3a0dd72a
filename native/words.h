// Sixteen bytes at a time, on any machine: how codes move between rows, tiles and packed bytes.
#pragma once
#include <cstdint>
#include <cstring>

namespace bitnet {
namespace {

typedef uint32_t Words __attribute__((vector_size(16), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(16), may_alias));
typedef int8_t SignedBytes __attribute__((vector_size(16), may_alias));
typedef uint64_t Pairs __attribute__((vector_size(16), may_alias));

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

inline Words low(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Words high(Words a, Words b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline Halves low(Halves a, Halves b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Halves high(Halves a, Halves b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Bytes low(Bytes a, Bytes b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline Bytes high(Bytes a, Bytes b) { return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
inline Words low_pair(Words a, Words b) { return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 0, 2); }
inline Words high_pair(Words a, Words b) { return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 1, 3); }

// The words of four rows: out[s] holds word s of each.
inline void transpose_words(const uint8_t* from, int64_t stride, Words out[4]) {
  const Words a = load<Words>(from), b = load<Words>(from + stride), c = load<Words>(from + 2 * stride), d = load<Words>(from + 3 * stride);
  const Words ab0 = low(a, b), ab1 = high(a, b), cd0 = low(c, d), cd1 = high(c, d);
  out[0] = low_pair(ab0, cd0), out[1] = high_pair(ab0, cd0), out[2] = low_pair(ab1, cd1), out[3] = high_pair(ab1, cd1);
}

inline Bytes join_base3(const Words t[5]) {  // kernels.h
  const Bytes high = (Bytes)t[2] + 3 * (Bytes)t[3] + 9 * (Bytes)t[4];  // below 27
  const SignedBytes h = (SignedBytes)high;
  return 9 * high + (Bytes)t[0] + 3 * (Bytes)t[1] - (Bytes)(h >= 7) - (Bytes)(h >= 14) - (Bytes)(h >= 21);  // true is -1
}

}  // namespace
}  // namespace bitnet
