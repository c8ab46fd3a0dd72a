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

// Tiles 0..3: sums, [token block][panel], or of one token block [odd step][panel]; 4, 5: activations of 16 tokens each; 6, 7: codes
// of a panel each. A step is the largest part of 64 inputs that divides a run.
static thread_local int64_t step = 64;

static void begin(int64_t inputs, int n_tokens) {
  step = inputs % 64 == 0 ? 64 : inputs % 32 == 0 ? 32 : 16;
  TileConfig c;
  for (int t = 0; t < 8; t++) c.rows[t] = (uint8_t)(t < 6 && n_tokens < 16 ? n_tokens : 16), c.row_bytes[t] = 64;  // fewer rows are done sooner
  c.row_bytes[4] = c.row_bytes[5] = (uint16_t)step;
  c.rows[6] = c.rows[7] = (uint8_t)(step / 4);
  __asm__ volatile("" : : "r"(&c) : "memory");  // gcc 12's intrinsic says that it reads the first eight bytes only, and the rest is never stored
  _tile_loadconfig(&c);
}
static void end() { _tile_release(); }

// Sums of more than 16 tokens: each tile of activations and of codes serves two products.
static void two_blocks(const uint8_t* codes, const uint8_t* other, int64_t inputs, const int8_t* x, int64_t x_stride) {
  const int8_t* x1 = x + 16 * x_stride;
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
}
// Sums of up to 16 tokens, even and odd steps apart: a product takes longer than the two others of a step hide.
static void one_block(const uint8_t* codes, const uint8_t* other, int64_t inputs, const int8_t* x, int64_t x_stride) {
  int64_t k = 0;
  for (; k + 2 * step <= inputs; k += 2 * step) {
    _tile_loadd(4, x + k, x_stride);
    _tile_loadd(6, codes + 16 * k, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, other + 16 * k, 64);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, x + k + step, x_stride);
    _tile_loadd(6, codes + 16 * (k + step), 64);
    _tile_dpbsud(2, 5, 6);
    _tile_loadd(7, other + 16 * (k + step), 64);
    _tile_dpbsud(3, 5, 7);
  }
  if (k < inputs) {
    _tile_loadd(4, x + k, x_stride);
    _tile_loadd(6, codes + 16 * k, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, other + 16 * k, 64);
    _tile_dpbsud(1, 4, 7);
  }
}

static void gemm_u8_i8_amx(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride,
                           int n_tokens, bool first, bool last, int32_t* out) {
  const uint8_t* other = codes + (n_panels > 1 ? panel_bytes : 0);
  int32_t* out1 = out + kGemmTokens * 16;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (n_tokens > 16) two_blocks(codes, other, inputs, x, x_stride);
  else one_block(codes, other, inputs, x, x_stride);
  if (!last) return;
  _tile_stored(0, out, 64);
  if (n_panels > 1) _tile_stored(1, out1, 64);
  if (n_tokens > 16) {
    _tile_stored(2, out + 16 * 16, 64);
    if (n_panels > 1) _tile_stored(3, out1 + 16 * 16, 64);
    return;
  }
  alignas(64) int32_t odd[16 * 16];
  _tile_stored(2, odd, 64);
  for (int i = 0; i < 16 * n_tokens; i++) out[i] += odd[i];
  if (n_panels > 1) {
    _tile_stored(3, odd, 64);
    for (int i = 0; i < 16 * n_tokens; i++) out1[i] += odd[i];
  }
}
}  // namespace

namespace bitnet {
#ifndef BITNET_EMULATED_AMX
const GemmInteger kGemmAmx = gemm_u8_i8_amx;
void (*const kBeginAmx)(int64_t, int) = begin;
void (*const kEndAmx)() = end;
#endif
}  // namespace bitnet
