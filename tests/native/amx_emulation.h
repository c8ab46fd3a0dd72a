// AMX's tile instructions in plain C++, so that native/kernels/amx.cpp can be tested on any machine: what Intel's manual (volume 2,
// TILELOADD, TDPBSUD, ...) says of them, and an abort where the processor would fault.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {
struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t bytes[16][64] = {};
};
inline thread_local Tile tiles[8];

inline void load_config(const void* p) {
  const uint8_t* c = static_cast<const uint8_t*>(p);
  if (c[0] != 1) std::abort();
  for (int i = 1; i < 16; i++)
    if (c[i]) std::abort();  // start row 0, the rest reserved
  for (int t = 0; t < 8; t++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, c + 16 + 2 * t, 2);
    tiles[t] = Tile{c[48 + t], row_bytes, {}};
    if (tiles[t].rows > 16 || row_bytes > 64 || (tiles[t].rows == 0) != (row_bytes == 0)) std::abort();
  }
}
inline Tile& used(int t) {
  if (t < 0 || t > 7 || !tiles[t].rows) std::abort();
  return tiles[t];
}
inline void load(int t, const void* base, int64_t stride) {
  Tile& tile = used(t);
  for (int r = 0; r < tile.rows; r++) std::memcpy(tile.bytes[r], static_cast<const uint8_t*>(base) + r * stride, tile.row_bytes);
}
inline void store(int t, void* base, int64_t stride) {
  Tile& tile = used(t);
  for (int r = 0; r < tile.rows; r++) std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile.bytes[r], tile.row_bytes);
}
inline void zero(int t) { std::memset(used(t).bytes, 0, sizeof used(t).bytes); }
inline void dot_signed_unsigned(int c, int a, int b) {  // TDPBSUD
  Tile &sums = used(c), &left = used(a), &right = used(b);
  if (left.rows != sums.rows || right.row_bytes != sums.row_bytes || left.row_bytes != 4 * right.rows) std::abort();
  for (int m = 0; m < sums.rows; m++)
    for (int n = 0; n < sums.row_bytes / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, &sums.bytes[m][4 * n], 4);
      for (int k = 0; k < left.row_bytes; k++) sum += int8_t(left.bytes[m][k]) * int(right.bytes[k / 4][4 * n + k % 4]);
      std::memcpy(&sums.bytes[m][4 * n], &sum, 4);
    }
}
}  // namespace amx_emulation

#define _tile_loadconfig(p) amx_emulation::load_config(p)
#define _tile_loadd(t, base, stride) amx_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) amx_emulation::store(t, base, stride)
#define _tile_zero(t) amx_emulation::zero(t)
#define _tile_dpbsud(c, a, b) amx_emulation::dot_signed_unsigned(c, a, b)
#define _tile_release() (void)0
