// AMX: one instruction multiplies a tile of 16 tokens x 64 inputs by one of 64 inputs x 16 rows, into 16 x 16 sums.
//
// A tile of codes is 16 of our 64-byte vectors, just as they lie: row k of it holds inputs 4k..4k+3 of 16 output rows.
#ifndef BITNET_EMULATED_AMX  // tests/native/amx_emulation.h
#include <immintrin.h>
#endif

#include "kernels.h"

using bitnet::kGemmTokens;

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3: sums, [token block][panel]; 4, 5: activations of 16 tokens each; 6, 7: codes of a panel each.
static void configure(int tokens0, int tokens1, int step) {
  TileConfig c;
  for (int t = 0; t < 4; t++) c.rows[t] = (uint8_t)(t < 2 ? tokens0 : tokens1), c.row_bytes[t] = 64;
  c.rows[4] = (uint8_t)tokens0, c.rows[5] = (uint8_t)tokens1, c.row_bytes[4] = c.row_bytes[5] = (uint16_t)step;
  c.rows[6] = c.rows[7] = (uint8_t)(step / 4), c.row_bytes[6] = c.row_bytes[7] = 64;
  if (!tokens1) c.row_bytes[2] = c.row_bytes[3] = c.row_bytes[5] = 0;
  _tile_loadconfig(&c);
}

static void gemm_u8_i8_amx(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride,
                           int n_tokens, int32_t* out) {
  const int step = inputs % 64 == 0 ? 64 : inputs % 32 == 0 ? 32 : 16;
  const int tokens0 = n_tokens < 16 ? n_tokens : 16, tokens1 = n_tokens - tokens0;
  const uint8_t* other = codes + (n_panels > 1 ? panel_bytes : 0);
  const int8_t* x1 = x + 16 * x_stride;
  configure(tokens0, tokens1, step);
  _tile_zero(0);
  _tile_zero(1);
  if (tokens1) {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs; k += step) {
      _tile_loadd(4, x + k, x_stride);
      _tile_loadd(6, codes + 16 * k, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, other + 16 * k, 64);
      _tile_dpbsud(1, 4, 7);
      _tile_loadd(5, x1 + k, x_stride);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(2, out + 16 * 16, 64);
    if (n_panels > 1) _tile_stored(3, out + (kGemmTokens + 16) * 16, 64);
  } else {
    for (int64_t k = 0; k < inputs; k += step) {
      _tile_loadd(4, x + k, x_stride);
      _tile_loadd(6, codes + 16 * k, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, other + 16 * k, 64);
      _tile_dpbsud(1, 4, 7);
    }
  }
  _tile_stored(0, out, 64);
  if (n_panels > 1) _tile_stored(1, out + kGemmTokens * 16, 64);
  _tile_release();
}
}  // namespace

namespace bitnet {
#ifndef BITNET_EMULATED_AMX
const GemmInteger kGemmAmx = gemm_u8_i8_amx;
#endif
}  // namespace bitnet
