// The interface between the engine and the instruction sets: one table of functions per set.
//
// Every function gives the same bits on every set. Integer products are exact; float operations run in an order fixed here,
// over 16 lanes, without fused multiply-add. A kernel file includes only this header, float_ops.h, <stdint.h> and intrinsics,
// and everything in it is static: a shared inline function could be kept by the linker in the copy that only some CPUs can run.
#pragma once
#include <stdint.h>

namespace bitnet {

// Weights lie in panels of 16 output rows. A vector of 64 bytes holds, for integer codes, tiles of 16 rows x 4 inputs:
// byte 4 * row + i is input i of the tile.
//   two-bit (ternary): one vector = 4 tiles, tile s in bits 2s..2s+1, so 16 inputs; code = trit + 1
//   int8:              one vector = 1 tile; code = weight + 128
//   f16, bf16, f32:    [in][16 rows]
constexpr int kPanelRows = 16;
constexpr int kTwoBitInputs = 16;  // inputs per 64-byte vector
constexpr int kInt8Inputs = 4;

enum class DenseType { f16, bf16, f32 };

// x rows hold at least the padded number of inputs, zero where padded. Bounds: |x| <= 128 and n_inputs <= 65536, so that
// int8 sums stay below 255 * 128 * 65536 < 2^31, and two-bit ones, shifted up by 6 bits, below 2 * 64 * 128 * 65536 / 4 = 2^28.
using DotInteger = void (*)(const uint8_t* panel, int64_t n_vectors, const int8_t* x, int64_t x_stride, int n_tokens,
                            int32_t* out /* [n_tokens, 16], sums of code * x */);
// n_inputs is a multiple of 4; input k is added to partial sum k % 4, the result is (0 + 1) + (2 + 3).
using DotDense = void (*)(const void* panel, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens,
                          float* out /* [n_tokens, 16] */);

// Many tokens (null where dot_* in blocks does as well): codes lie unpacked, [n_panels][inputs / 4][16 rows][4], panel_bytes apart; n_panels is 1 or 2, n_tokens at most
// kGemmTokens, inputs a multiple of 16. Two panels at once, because a tile of activations serves both.
constexpr int kKeyBlock = 16;  // positions
constexpr int kGemmTokens = 32;
using GemmInteger = void (*)(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride,
                             int n_tokens, int32_t* out /* [n_panels, kGemmTokens, 16], sums of code * x */);

struct Kernels {
  const char* name;
  DotInteger dot_t2_i8;
  DotInteger dot_i8_i8;
  GemmInteger gemm_u8_i8;
  void (*unpack_t2)(const uint8_t* panel, int64_t n_vectors, uint8_t* codes /* [4 * n_vectors, 64] */);
  // sums[t, r] += float(dots[t, r] - bias * x_sums[t * stride]) * scale[r], times steps[t * step_stride] if steps is not null
  void (*scale_sums)(const int32_t* dots, const int32_t* x_sums, int64_t stride, int bias, const float* scale, const float* steps,
                     int64_t step_stride, int n_tokens, float* sums /* [n_tokens, 16] */);
  DotDense dot_f16_f32, dot_bf16_f32, dot_f32_f32;

  // out = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // int8 per token; returns the step, x is about q * step. Rounds half to even.
  float (*quantize)(const float* x, int n, int8_t* q);
  // out = act(gate) * up
  void (*silu_gate)(const float* gate, const float* up, int n, float* out);
  void (*relu2_gate)(const float* gate, const float* up, int n, float* out);
  void (*gelu_tanh_gate)(const float* gate, const float* up, int n, float* out);
  void (*add)(float* x, const float* y, int n);
  void (*store_f16)(const float* x, int n, uint16_t* out);
  // Attention of some queries, which share their keys and values, over one page of cached positions; head_dim is a multiple of
  // 16 (padded with zeros). Keys lie in blocks of 16 positions, dimension by dimension, so that a vector holds 16 positions; a
  // score is the sum over the even dimensions, in order, plus that over the odd ones, times scale.
  void (*scores_f16)(const float* q /* [n_queries, head_dim] */, int n_queries, const uint16_t* k /* [n_blocks, head_dim, 16] */,
                     int n_blocks, int head_dim, float scale, float* out /* [n_queries, stride], from 0 */, int64_t stride);
  float (*softmax)(float* scores, int n);  // scores -> exp(score - max), returns their sum; scores has room for 16 more
  // out += p v, position after position
  void (*weigh_f16)(const float* p /* [n_queries, stride] */, int64_t stride, int n_queries, const uint16_t* v /* [n, head_dim] */, int n,
                    int head_dim, float* out /* [n_queries, head_dim] */);
  uint64_t (*read_bytes)(const void* p, int64_t bytes);  // touches every byte, multiple of 64: the memory's limit
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512Vnni;
extern const GemmInteger kGemmAmx;
#endif

// ---- dispatch.cpp
struct IsaReport {
  const char* name;
  bool supported;       // by this CPU and operating system
  const char* failure;  // of the self-test: the name of the first kernel that differs from the scalar one, or nullptr
};
constexpr int kMaxIsas = 8;
int test_isas(IsaReport* reports);  // best first; returns how many
// The best instruction set whose self-test passes. `wanted`: a name, or nullptr. Returns nullptr when `wanted` is unknown or
// cannot run here; sets *failed to the name of a better set that failed its self-test, else nullptr.
const Kernels* choose_kernels(const char* wanted, const char** failed);

}  // namespace bitnet
