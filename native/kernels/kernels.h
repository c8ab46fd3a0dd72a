// The interface between the engine and the instruction sets: one table of functions per set.
//
// Every function gives the same bits on every set. Integer products are exact; float operations run in an order fixed here,
// over 16 lanes, fused multiply-adds only where fma16 says so. A kernel file includes only this header, float_ops.h, integer_ops.h,
// <stdint.h> and intrinsics, and everything in it is static: a shared inline function could be kept by the linker in the copy that
// only some CPUs can run.
#pragma once
#include <stdint.h>

namespace bitnet {

// Weights lie in panels of 16 output rows. For integer codes a panel is a row of vectors of 64 bytes, which hold tiles of 16 rows
// x 4 inputs: byte 4 * row + i is input i of the tile, stored as code = weight + bias.
//   two-bit (ternary): one vector = 4 tiles, tile s in bits 2s..2s+1, so 16 inputs; bias 1
//   base-3 (ternary):  one vector = 5 tiles, so 20 inputs; bias 1; every group starts a new vector. With l = code_0 + 3 code_1 and
//                      h = code_2 + 3 code_3 + 9 code_4, byte = 9h + l + h / 7: the low six bits are 9 (h % 7) + l, the upper h / 7,
//                      so that a table of 64 entries finds code_0 and code_1 without a division (docs/performance.md)
//   binary:            one vector = 8 tiles, tile s in bit s, so 32 inputs; the bit is half the code, 0 or 2; bias 1
//   int4:              one vector = 2 tiles, tile s in bits 4s..4s+3, so 8 inputs; bias 8
//   fp4:               as int4; the four bits are an E2M1 number, the code is twice its value; bias 12
//   int8:              one vector = 1 tile; bias 128
//   f16, bf16, f32:    [in][16 rows]
// Where a panel holds no weight its bytes are 0. So are the codes, except fp4's: they add nothing, whatever they are multiplied by.
constexpr int kPanelRows = 16;
constexpr int kKeyBlock = 16;  // positions whose keys lie together
constexpr int kMostHeadDim = 1024;  // of quantized keys and values, padded
constexpr int kGemmTokens = 32;  // at most, in a product for many tokens
constexpr int kGemmRuns = 4;     // whose sums are scaled together
constexpr int kSlack = 2048;  // readable bytes after the last panel, and after the last row of activations

// How far ahead of their use weights are fetched, in bytes: into L2 (base-3, which reads slower and more evenly, apart), and into L1, 0 where
// the CPU's own prefetching does that better. Of this CPU, found at start-up.
struct FetchAhead {
  int64_t into_l2, base3_into_l2, into_l1;
};
constexpr FetchAhead kUsualFetchAhead = {4096, 6144, 1024};
#if defined(__x86_64__)
extern const FetchAhead kFetchAhead;
#else
constexpr FetchAhead kFetchAhead = kUsualFetchAhead;
#endif

constexpr uint8_t kFp4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // of an E2M1 number

enum class DenseType { f16, bf16, f32 };

// A run of inputs over which both the weights' scale and the activations' step are constant.
struct Run {
  int first, inputs;        // inputs: a multiple of 16, or up to the end
  int vector, n_vectors;    // where it lies in a panel
  int weight_group, step_group;
};

struct IntegerMatrix {
  const uint8_t* panels;        // [ceil(rows / 16), panel_bytes]
  int64_t panel_bytes;          // with the scales, where they lie behind the codes
  const float* scales;          // [ceil(rows / 16), n_groups, 16], or null and then
  const uint16_t* half_scales;  // the same in f16
  int64_t panel_scales;         // from a panel's scales to the next one's, 0 if all rows share one scale
  int rows, bias;
};

// A batch of activation rows in int8: x is about q * step. Bounds: |q| <= 128 and inputs <= 65536, so that int8 sums stay below
// 255 * 128 * 65536 < 2^31, int4 ones, shifted up by 4 bits, below 15 * 16 * 128 * 65536 / 2 < 2^30, two-bit ones, shifted up by
// 6 bits, below 2 * 64 * 128 * 65536 / 4 = 2^28, and binary ones, shifted up by 7, below 128 * 128 * 65536 / 8 = 2^27.
struct QuantizedRows {
  const int8_t* q;          // [n_tokens, stride], zero-padded
  int64_t stride;
  const Run* runs;
  int n_runs;
  const int32_t* run_sums;  // [n_tokens, n_runs], sums of q
  const float* steps;       // [n_tokens, n_steps]
  int n_steps;
  bool grouped;             // a step belongs to its run; else to the whole token
  int n_tokens;
};

// y [n_tokens, rows]: the product for `n_panels` panels from `panel` on. Per run in order the exact sum, less bias * run_sum, as a
// float times the scale (and times the step, if grouped) is added; at the end times the step (if not grouped).
using MultiplyInteger = void (*)(const IntegerMatrix& w, const QuantizedRows& x, int panel, int n_panels, float* y);
// The same for dense weights. n_inputs is a multiple of 4; input k is added to partial sum k % 4, fused; the result is (0 + 1) + (2 + 3).
// n_panels is 1 or 2, panel_bytes apart; n_tokens at most kGemmTokens.
using MultiplyDense = void (*)(const void* panels, int64_t panel_bytes, int n_panels, int64_t n_inputs, const float* x, int64_t x_stride,
                               int n_tokens, float* out /* [n_panels, kGemmTokens, 16] */);
// An adapter's weights: integers of 16 or 8 bits. y [n_tokens, y_stride] += the products with n_rows rows; panels [ceil(n_rows / 16)]
// [n_inputs / 4][inputs 0 and 2, inputs 1 and 3][16 rows][2], those of 8 bits [n_inputs / 4][16 rows][4]; n_inputs a multiple of 4. Each four of x are rounded to 15 bits with one step, 1 / 16383 of the largest; their
// exact sum of products times the step joins y in order, fused.
template <class Code>
using AddCodes = void (*)(const Code* panels, int n_rows, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* y, int64_t y_stride);
// out [n_tokens, out_stride]: x times few rows of such weights, row_stride apart and readable up to the next multiple of 64 bytes. Those of 16
// bits count 2^16 times, those of 8 bits 2^24 times. In 64 bytes inputs l, l + 16, ... lie side by side. Lane l adds their products in order,
// fused; the lanes are a fixed tree.
template <class Code>
using DotCodes = void (*)(const Code* rows, int n_rows, int64_t row_stride, int64_t n_inputs, const float* x, int64_t x_stride, int n_tokens, float* out,
                        int64_t out_stride);

// Many tokens: codes lie unpacked, [n_panels][inputs / 4][16 rows][4], panel_bytes apart; n_panels is 1 or 2, n_tokens at most
// kGemmTokens, inputs a multiple of 16 below 65536. Two panels at once, because a tile of activations serves both. Rows of x up to
// the next multiple of 16 are readable; so are out's. A product may come in parts of the inputs: the first one starts the sums anew, out
// holds them after the last one, and nothing else is multiplied in between.
using GemmInteger = void (*)(const uint8_t* codes, int64_t panel_bytes, int n_panels, int64_t inputs, const int8_t* x, int64_t x_stride,
                             int n_tokens, bool first, bool last, int32_t* out /* [n_panels, kGemmTokens, 16], sums of code * x */);
// ahead: how many bytes after each vector what is unpacked next lies.
using Unpack = void (*)(const uint8_t* panel, int64_t n_vectors, int64_t ahead, uint8_t* codes /* [tiles, 64] */);

// Lines: rows or columns of a ternary matrix that lie one by one, in line_bytes each, a multiple of 64, two-bit or base-3. In vector v of a
// row digit s of byte b is input 64 (D v + s) + b, where D is how many digits a byte has; in one of a column digit s of byte 16 l + 4 i + k
// is row 64 (D v + s) + 16 i + 4 l + k, so that four columns zipped byte by byte are tiles. which[n .. n + ahead + 4) are lines too, to be fetched.
using DotLines = void (*)(const uint8_t* rows, int64_t line_bytes, const int32_t* which, int n, int ahead, const int8_t* x,
                          int32_t* out /* [n]: sums of code * x */);
// sums [rows in line_bytes] += codes of column * x of column, over the n columns
using AddLines = void (*)(const uint8_t* columns, int64_t line_bytes, const int32_t* which, int n, int ahead, const int8_t* x, int32_t* sums);
// bits [(n + 63) / 64]: bit i % 64 of word i / 64 says whether relu(gate[i])^2, or q[i], is not zero; beyond n they are 0.
using MarkGates = void (*)(const float* gate, int n, uint64_t* bits);
using MarkCodes = void (*)(const int8_t* q, int n, uint64_t* bits);
// Digit `digit` of a vector of n columns as tiles: those of 4 panels, panel_bytes apart. Up to the next multiple of 4 any codes follow.
using UnpackColumns = void (*)(const uint8_t* columns, int64_t line_bytes, int n, int digit, uint8_t* codes, int64_t panel_bytes);

struct Kernels {
  const char* name;
  int gemm_tokens;  // from how many on gemm_* is faster than multiply_*, where runs are long
  MultiplyInteger multiply_t2, multiply_b3, multiply_b1, multiply_i4, multiply_fp4, multiply_i8;
  GemmInteger gemm_ternary, gemm_i4, gemm_fp4, gemm_i8;  // codes up to 2 (binary too), 15, 24, 255; null where multiply_* does as well
  // Before a thread calls gemm_* with multiples of these inputs and up to so many tokens, and after; may be null.
  void (*begin_gemm)(int64_t inputs, int n_tokens);
  void (*end_gemm)();
  Unpack unpack_t2, unpack_b3, unpack_b1, unpack_i4, unpack_fp4;
  // sums [n_tokens, 16] += what runs [first, first + n_runs) of the panel add for tokens t0.., given their dots [n_runs, n_tokens, 16], dots_stride
  // apart from run to run; n_runs is at most kGemmRuns.
  void (*add_runs)(const IntegerMatrix& w, const QuantizedRows& x, int first, int n_runs, int panel, int t0, int n_tokens, const int32_t* dots,
                   int64_t dots_stride, float* sums);
  // y [n_tokens, rows] of the panels for tokens t0.., where there is one run, given its dots [n_panels, kGemmTokens, 16]
  void (*write_run)(const IntegerMatrix& w, const QuantizedRows& x, int panel, int n_panels, int t0, int n_tokens, const int32_t* dots, float* y);
  int32_t (*sum_i8)(const int8_t* q, int n);
  DotLines dot_lines_t2, dot_lines_b3;
  AddLines add_lines_t2, add_lines_b3;
  UnpackColumns unpack_columns_t2, unpack_columns_b3;
  MarkGates mark_gates;
  MarkCodes mark_codes;
  MultiplyDense multiply_f16, multiply_bf16, multiply_f32;
  AddCodes<int16_t> add_i16;
  AddCodes<int8_t> add_i8;
  DotCodes<int16_t> dot_i16;
  DotCodes<int8_t> dot_i8;

  // out = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // int8 per token; returns the step, x is about q * step. Rounds half to even. sum: that of q.
  float (*quantize)(const float* x, int n, int8_t* q, int32_t* sum);
  // out = act(gate) * up
  void (*silu_gate)(const float* gate, const float* up, int n, float* out);
  void (*relu2_gate)(const float* gate, const float* up, int n, float* out);
  void (*gelu_tanh_gate)(const float* gate, const float* up, int n, float* out);
  void (*add)(float* x, const float* y, int n);
  // Rotates every head's halves: (a, b) -> (a cos - b sin, b cos + a sin)
  void (*rotate)(float* x /* [n_heads, 2, half] */, int n_heads, int half, const float* cosine, const float* sine);
  // Each run of `block` elements, a power of two that divides n, by the Hadamard matrix over the root of block: lanes 1 apart, then 2, 4, ...
  void (*hadamard)(float* x, int n, int block);
  void (*store_f16)(const float* x, int n, uint16_t* out);  // n a multiple of 16, here and below
  void (*load_f16)(const uint16_t* x, int n, float* out);
  // Attention of some queries, which share their keys and values, over one page of cached positions; head_dim is a multiple of
  // 16 (padded with zeros). Keys lie in blocks of 16 positions, dimension by dimension, so that a vector holds 16 positions; a
  // score is a chain of fused multiply-adds, dimension after dimension, times scale.
  void (*scores_f16)(const float* q /* [n_queries, head_dim] */, int n_queries, const uint16_t* k /* [n_blocks, head_dim, 16] */,
                     int n_blocks, int head_dim, float scale, float* out /* [n_queries, stride], from 0 */, int64_t stride);
  float (*softmax)(float* scores, int n);  // scores -> exp(score - max), returns their sum; scores has room for 16 more
  // out += p v, position after position, fused
  void (*weigh_f16)(const float* p /* [n_queries, stride] */, int64_t stride, int n_queries, const uint16_t* v /* [n, head_dim] */, int n,
                    int head_dim, float* out /* [n_queries, head_dim] */);
  // Attention's weights of up to 64 positions with quantized values, n a multiple of 16: p * scale >= 0 in steps of the largest / 16256, a
  // fixed-point number of 15 bits, as 128 high + low in int8 for an integer product; and the sums of the two parts.
  void (*split_weights)(const float* p, const uint16_t* scales, int n, int8_t* high, int8_t* low, float* high_step, float* low_step,
                        int32_t* high_sum, int32_t* low_sum);
  uint64_t (*read_bytes)(const void* p, int64_t bytes);  // touches every byte, multiple of 64: the memory's limit
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Vbmi;
extern const GemmInteger kGemmAmx;
extern void (*const kBeginAmx)(int64_t inputs, int n_tokens);
extern void (*const kEndAmx)();
#elif defined(__aarch64__)
extern const Kernels kNeon, kNeonDotprod, kNeonI8mm;
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
struct Candidate {
  const Kernels* kernels;
  bool supported;
};
// The same among `candidates`, best first. The test remembers kernels by their address.
const Kernels* choose_kernels(const Candidate* candidates, int n, const char* wanted, const char** failed);

}  // namespace bitnet
