// Which instruction set runs: the best that the CPU has and that gives the scalar kernels' bits in a test at start-up.
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace bitnet {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// AMX int8 tiles: the CPU has them, and Linux (5.16 or later) lets this process use their state, for which it must be asked.
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& amx_kernels() {  // AVX-512's, with tiles for many tokens
  static const Kernels k = [] {
    Kernels made = kAvx512Vnni;
    made.name = "amx", made.gemm_u8_i8 = kGemmAmx;
    return made;
  }();
  return k;
}
#endif

int list_candidates(Candidate* out) {  // best first
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();  // the feature bits of gcc include the operating system's permission for the registers
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  static const bool amx = avx512 && amx_permitted();
  out[n++] = {&amx_kernels(), amx};
  out[n++] = {&kAvx512Vnni, avx512};
  out[n++] = {&kAvx2, avx2};
#endif
  out[n++] = {&kScalar, true};
  return n;
}

uint32_t next_random(uint32_t& state) {  // xorshift32
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

// Runs every kernel of `k` on small random and extreme inputs; returns the name of the first whose bits are not those of kScalar.
const char* first_difference(const Kernels& k) {
  constexpr int kInputs = 160, kTokens = 9, kVectors = kInputs / kTwoBitInputs;
  alignas(64) uint8_t panel[kInputs * 16], codes[kVectors * 64];
  alignas(64) int8_t x[kTokens * kInputs], q1[kInputs], q2[kInputs];
  alignas(64) int32_t i1[kTokens * 16], i2[kTokens * 16], g1[2 * kGemmTokens * 16];
  alignas(64) uint8_t unpacked[kVectors * 256], panel2[kVectors * 256];
  alignas(64) float f[kTokens * kInputs], g[kInputs + 16], f1[kInputs + 16], f2[kInputs + 16];
  alignas(64) float s1[7 * 144], s2[7 * 144];
  alignas(64) uint16_t h1[kInputs], h2[kInputs], halves[kTokens * kInputs], brains[kTokens * kInputs];
  uint32_t state = 2463534242u;
  for (int round = 0; round < 3; round++) {
    for (uint8_t& b : codes) {  // four codes of 0..2
      b = 0;
      for (int s = 0; s < 8; s += 2) b = (uint8_t)(b | (round == 0 ? 2 : next_random(state) % 3) << s);
    }
    for (int8_t& b : x) b = round == 0 ? 127 : round == 1 ? -128 : (int8_t)next_random(state);
    for (float& v : f) v = ((int32_t)next_random(state) >> 8) * (1.0f / (1 << 21));
    for (int i = 0; i < kInputs; i++) g[i] = ((int32_t)next_random(state) >> 8) * (1.0f / (1 << 20));

    k.dot_t2_i8(codes, kVectors, x, kInputs, kTokens, i1), kScalar.dot_t2_i8(codes, kVectors, x, kInputs, kTokens, i2);
    if (memcmp(i1, i2, sizeof i1)) return "dot_t2_i8";
    for (uint8_t& b : panel) b = round == 0 ? 255 : (uint8_t)next_random(state);
    k.dot_i8_i8(panel, kInputs / 4, x, kInputs, kTokens, i1), kScalar.dot_i8_i8(panel, kInputs / 4, x, kInputs, kTokens, i2);
    if (memcmp(i1, i2, sizeof i1)) return "dot_i8_i8";

    constexpr int kGemmInputs[] = {160, 128, 48};  // in steps of 32, 64 and 16
    if (k.gemm_u8_i8)
      for (int inputs : kGemmInputs)
        for (int tokens = 1; tokens <= kTokens; tokens += 4) {
          k.gemm_u8_i8(panel, 16 * inputs, 1, inputs, x, kInputs, tokens, g1);
          kScalar.dot_i8_i8(panel, inputs / 4, x, kInputs, tokens, i2);
          if (memcmp(g1, i2, size_t(tokens) * 64)) return "gemm_u8_i8";
          k.gemm_u8_i8(panel, 0, 2, inputs, x, kInputs, tokens, g1);
          if (memcmp(g1, i2, size_t(tokens) * 64) || memcmp(g1 + kGemmTokens * 16, i2, size_t(tokens) * 64)) return "gemm_u8_i8";
        }
    k.unpack_t2(codes, kVectors, unpacked), kScalar.unpack_t2(codes, kVectors, panel2);
    if (memcmp(unpacked, panel2, sizeof unpacked)) return "unpack_t2";
    for (float& v : f1) v = 0.5f;
    memcpy(f2, f1, sizeof f1);
    k.scale_sums(i1, i2, 1, 128, f, g, 1, kTokens, f1), kScalar.scale_sums(i1, i2, 1, 128, f, g, 1, kTokens, f2);
    k.scale_sums(i2, i1, 1, 1, f, nullptr, 0, kTokens, f1), kScalar.scale_sums(i2, i1, 1, 1, f, nullptr, 0, kTokens, f2);
    if (memcmp(f1, f2, kTokens * 16 * sizeof(float))) return "scale_sums";

    constexpr int kDense = 80;  // inputs whose 16 rows fit into f
    kScalar.store_f16(f, kDense * 16, halves);
    for (int i = 0; i < kDense * 16; i++) memcpy(&brains[i], reinterpret_cast<const char*>(f + i) + 2, 2);  // bf16: the upper half
    const DotDense dense[3][2] = {{k.dot_f16_f32, kScalar.dot_f16_f32}, {k.dot_bf16_f32, kScalar.dot_bf16_f32}, {k.dot_f32_f32, kScalar.dot_f32_f32}};
    const void* weights[3] = {halves, brains, f};
    float y1[kTokens * 16], y2[kTokens * 16];
    for (int d = 0; d < 3; d++) {
      dense[d][0](weights[d], kDense, f, kInputs, kTokens, y1), dense[d][1](weights[d], kDense, f, kInputs, kTokens, y2);
      if (memcmp(y1, y2, sizeof y1)) return "dot_dense";
    }
    for (int n = kInputs; n >= kInputs - 7; n -= 7) {
      k.rms_norm(f, g, n, 1e-5f, f1), kScalar.rms_norm(f, g, n, 1e-5f, f2);
      if (memcmp(f1, f2, n * sizeof(float))) return "rms_norm";
      float s1 = k.quantize(f, n, q1), s2 = kScalar.quantize(f, n, q2);
      if (s1 != s2 || memcmp(q1, q2, n)) return "quantize";
      k.silu_gate(f, g, n, f1), kScalar.silu_gate(f, g, n, f2);
      if (memcmp(f1, f2, n * sizeof(float))) return "silu_gate";
      k.relu2_gate(f, g, n, f1), kScalar.relu2_gate(f, g, n, f2);
      if (memcmp(f1, f2, n * sizeof(float))) return "relu2_gate";
      k.gelu_tanh_gate(f, g, n, f1), kScalar.gelu_tanh_gate(f, g, n, f2);
      if (memcmp(f1, f2, n * sizeof(float))) return "gelu_tanh_gate";
      memcpy(f1, f, n * sizeof(float)), memcpy(f2, f, n * sizeof(float));
      s1 = k.softmax(f1, n), s2 = kScalar.softmax(f2, n);
      if (s1 != s2 || memcmp(f1, f2, n * sizeof(float))) return "softmax";
      k.add(f1, g, n), kScalar.add(f2, g, n);
      if (memcmp(f1, f2, n * sizeof(float))) return "add";
    }
    k.store_f16(f, kInputs, h1), kScalar.store_f16(f, kInputs, h2);
    if (memcmp(h1, h2, sizeof h1)) return "store_f16";
    for (int queries = 1; queries <= 7; queries += 3) {
      k.scores_f16(f, queries, halves, 5, 16, 0.125f, s1, 80), kScalar.scores_f16(f, queries, halves, 5, 16, 0.125f, s2, 80);
      if (memcmp(s1, s2, size_t(queries) * 80 * sizeof(float))) return "scores_f16";
      for (int n = 0; n < 7 * 144; n++) s1[n] = s2[n] = 0.25f;
      k.weigh_f16(f, 9, queries, halves, 7, 144, s1), kScalar.weigh_f16(f, 9, queries, halves, 7, 144, s2);
      if (memcmp(s1, s2, size_t(queries) * 144 * sizeof(float))) return "weigh_f16";
    }
    if (k.read_bytes(codes, sizeof codes) != kScalar.read_bytes(codes, sizeof codes)) return "read_bytes";
  }
  return nullptr;
}

}  // namespace

int test_isas(IsaReport* reports) {
  Candidate candidates[kMaxIsas];
  int n = list_candidates(candidates);
  for (int i = 0; i < n; i++) {
    const Candidate& c = candidates[i];
    reports[i] = {c.kernels->name, c.supported, c.supported ? first_difference(*c.kernels) : nullptr};
  }
  return n;
}

const Kernels* choose_kernels(const char* wanted, const char** failed) {
  *failed = nullptr;
  Candidate candidates[kMaxIsas];
  int n = list_candidates(candidates);
  for (int i = 0; i < n; i++) {
    const Candidate& c = candidates[i];
    if (!c.supported || (wanted && strcmp(wanted, c.kernels->name))) continue;
    if (!first_difference(*c.kernels)) return c.kernels;
    if (!*failed) *failed = c.kernels->name;
  }
  return nullptr;
}

}  // namespace bitnet
