// Which instruction set runs: the best that the CPU has and that gives the scalar kernels' bits in a test at start-up.
#include <string.h>

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

#include "kernels.h"

namespace bitnet {
namespace {

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

bool has_f16c() {  // a name that clang 14 does not know; its registers are AVX's
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx_vnni() {  // nor this one
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

FetchAhead fetch_ahead() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") ? FetchAhead{8192, 8192, 0} : kUsualFetchAhead;  // docs/log.md
}

const Kernels& amx_kernels() {  // AVX-512's, with tiles for many tokens
  static const Kernels k = [] {
    Kernels made = kAvx512Vbmi;
    made.name = "amx", made.gemm_ternary = made.gemm_i4 = made.gemm_fp4 = made.gemm_i8 = kGemmAmx;
    made.begin_gemm = kBeginAmx, made.end_gemm = kEndAmx, made.gemm_tokens = 5;
    return made;
  }();
  return k;
}
#elif defined(__aarch64__)
struct ArmFeatures {
  bool dotprod = false, i8mm = false;
};
ArmFeatures arm_features() {  // what is not known here is taken for missing. Tried on Linux only
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  return {(getauxval(AT_HWCAP) & kDotprod) != 0, (getauxval(AT_HWCAP2) & kI8mm) != 0};
#elif defined(__APPLE__)
  auto has = [](const char* feature) {
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#elif defined(_WIN32)
  constexpr DWORD kDotprod = 43, kI8mm = 66;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
  return {IsProcessorFeaturePresent(kDotprod) != 0, IsProcessorFeaturePresent(kI8mm) != 0};
#else
  return {};
#endif
}
#endif

int list_candidates(Candidate* out) {  // best first
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();  // the feature bits of gcc include the operating system's permission for the registers
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi");
  static const bool amx = vbmi && amx_permitted();
  out[n++] = {&amx_kernels(), amx};
  out[n++] = {&kAvx512Vbmi, vbmi};
  out[n++] = {&kAvx512Vnni, avx512};
  out[n++] = {&kAvxVnni, avx2 && has_avx_vnni()};
  out[n++] = {&kAvx2, avx2};
#elif defined(__aarch64__)
  static const ArmFeatures arm = arm_features();
  out[n++] = {&kNeonI8mm, arm.dotprod && arm.i8mm};
  out[n++] = {&kNeonDotprod, arm.dotprod};
  out[n++] = {&kNeon, true};  // every 64-bit Arm
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
  constexpr int kInputs = 160, kTokens = 19, kCodes = kInputs * 16;  // kCodes: of a panel of int8
  alignas(64) uint8_t panel[2 * kCodes + kSlack] = {}, tiles1[kCodes], tiles2[kCodes];
  alignas(64) int8_t x[32 * kInputs + kSlack] = {}, q1[kInputs], q2[kInputs];
  alignas(64) int32_t dots[2 * kGemmTokens * 16], sums[kTokens * 2], exact[3][kTokens][16];
  alignas(64) float f[kTokens * kInputs], g[kInputs + 16], f1[kInputs + 16], f2[kInputs + 16];
  alignas(64) float s1[13 * 144], s2[13 * 144], y1[kTokens * 32], y2[kTokens * 32], all[kTokens * 30], products[2][2 * kGemmTokens * 16];
  alignas(64) int32_t line_sums[2][640];
  alignas(64) uint16_t h1[kInputs], h2[kInputs], halves[kTokens * kInputs], brains[kTokens * kInputs];
  uint32_t state = 2463534242u;
  for (int round = 0; round < 3; round++) {
    for (int8_t& b : x) b = round == 0 ? 127 : round == 1 ? -128 : (int8_t)next_random(state);
    for (float& v : f) v = ((int32_t)next_random(state) >> 8) * (1.0f / (1 << 21));
    for (int i = 0; i < kInputs; i++) g[i] = ((int32_t)next_random(state) >> 8) * (1.0f / (1 << 20));
    kScalar.store_f16(f, kTokens * kInputs, halves);
    for (int t = 0; t < kTokens; t++) {
      sums[2 * t] = k.sum_i8(x + t * kInputs, 80), sums[2 * t + 1] = k.sum_i8(x + t * kInputs + 80, 77);
      if (sums[2 * t] != kScalar.sum_i8(x + t * kInputs, 80) || sums[2 * t + 1] != kScalar.sum_i8(x + t * kInputs + 80, 77)) return "sum_i8";
    }

    // Two groups of 80 inputs, 30 rows in two panels, with the largest codes or random ones.
    struct Codec {
      MultiplyInteger mine, scalar;
      GemmInteger gemm;
      Unpack unpack, scalar_unpack;
      int tiles, top, bias;
      const char* name;
    };
    const Codec codecs[] = {{k.multiply_t2, kScalar.multiply_t2, k.gemm_ternary, k.unpack_t2, kScalar.unpack_t2, 4, 2, 1, "multiply_t2"},
                            {k.multiply_b3, kScalar.multiply_b3, k.gemm_ternary, k.unpack_b3, kScalar.unpack_b3, 5, 2, 1, "multiply_b3"},
                            {k.multiply_b1, kScalar.multiply_b1, k.gemm_ternary, k.unpack_b1, kScalar.unpack_b1, 8, 1, 1, "multiply_b1"},
                            {k.multiply_i4, kScalar.multiply_i4, k.gemm_i4, k.unpack_i4, kScalar.unpack_i4, 2, 15, 8, "multiply_i4"},
                            {k.multiply_fp4, kScalar.multiply_fp4, k.gemm_fp4, k.unpack_fp4, kScalar.unpack_fp4, 2, 7, 12, "multiply_fp4"},
                            {k.multiply_i8, kScalar.multiply_i8, k.gemm_i8, nullptr, nullptr, 1, 255, 128, "multiply_i8"}};
    for (const Codec& c : codecs) {
      const int vectors = kInputs / 4 / c.tiles, group_vectors = (kInputs / 8 + c.tiles - 1) / c.tiles;
      const int base = c.tiles == 8 ? 2 : c.tiles == 4 ? 4 : c.tiles == 2 ? 16 : 256;
      for (int i = 0; i < 4 * 64 * group_vectors; i++) {
        int byte = 0;
        if (c.tiles == 5) {  // any h < 27 and l < 9
          const int h = round < 2 ? 26 : (int)(next_random(state) % 27), l = round < 2 ? 8 : (int)(next_random(state) % 9);
          byte = 9 * h + l + h / 7;
        } else {
          for (int s = 0; s < c.tiles; s++) byte = byte * base + (round < 2 ? c.top : (int)(next_random(state) % (unsigned)(c.top + 1)));
        }
        panel[i] = (uint8_t)byte;
      }
      Run runs[2];
      for (int r = 0; r < 2; r++) runs[r] = {80 * r, 80, r * group_vectors, group_vectors, r, r};
      for (int half = 0; half < 2; half++) {
        const IntegerMatrix w{panel, 128 * group_vectors, half ? nullptr : f, half ? halves : nullptr, 32, 30, c.bias};
        c.scalar(w, {x, kInputs, runs, 2, sums, g, 2, half == 0, kTokens}, 0, 2, all);  // once: a token's row is the same in any number
        for (int tokens = 1; tokens <= kTokens; tokens += tokens < 9 ? 1 : 10) {
          const QuantizedRows rows{x, kInputs, runs, 2, sums, g, 2, half == 0, tokens};
          for (float& v : y1) v = 0.5f;
          memcpy(y2, y1, sizeof y1), memcpy(y2, all, tokens * 30 * sizeof(float));
          c.mine(w, rows, 0, 2, y1);
          if (memcmp(y1, y2, sizeof y1)) return c.name;
          for (int i = 0; i < 2 * kGemmTokens * 16; i++) dots[i] = (int32_t)(next_random(state) % 99999);
          k.add_runs(w, rows, 0, 2, 1, 0, tokens, dots, kTokens * 16, y1), kScalar.add_runs(w, rows, 0, 2, 1, 0, tokens, dots, kTokens * 16, y2);
          if (memcmp(y1, y2, sizeof y1)) return "add_runs";
          k.write_run(w, rows, 0, 2, 0, tokens, dots, y1), kScalar.write_run(w, rows, 0, 2, 0, tokens, dots, y2);
          if (memcmp(y1, y2, sizeof y1)) return "write_run";
        }
      }
      if (c.unpack) {
        c.unpack(panel, vectors, 0, tiles1), c.scalar_unpack(panel, vectors, 0, tiles2);
        if (memcmp(tiles1, tiles2, sizeof tiles1)) return "unpack";
      } else {
        memcpy(tiles1, panel, sizeof tiles1);
      }
      if (!c.gemm) continue;
      constexpr int kGemmInputs[] = {160, 128, 48};  // in steps of 32, 64 and 16
      for (int t = 0; t < kTokens; t++)
        for (int row = 0; row < 16; row++)
          for (int i = 0, dot = 0; i < kInputs; i++) {
            dot += tiles1[16 * (i / 4 * 4) + 4 * row + i % 4] * x[t * kInputs + i];
            for (int n = 0; n < 3; n++)
              if (i + 1 == kGemmInputs[n]) exact[n][t][row] = dot;
          }
      for (int n = 0; n < 3; n++) {
        const int inputs = kGemmInputs[n];
        const char* wrong = nullptr;
        for (int tokens = 1; tokens <= kTokens; tokens += 6)
          for (int panels = 1; panels <= 2; panels++) {
            const int part = inputs == 160 ? 96 : inputs == 128 ? 64 : 32;
            if (k.begin_gemm) k.begin_gemm(part | inputs, tokens);
            c.gemm(tiles1, 0, panels, part, x, kInputs, tokens, true, false, dots);
            c.gemm(tiles1 + part * 16, 0, panels, inputs - part, x + part, kInputs, tokens, false, true, dots);
            if (k.end_gemm) k.end_gemm();
            for (int p = 0; p < panels; p++)
              if (memcmp(exact[n], dots + p * kGemmTokens * 16, tokens * sizeof exact[n][0])) wrong = "gemm";
          }
        if (wrong) return wrong;
      }
    }

    // Lines of two vectors, some of them and a number that is no multiple of 4.
    constexpr int kLine = 128, kLines = 13, kWhich[20] = {0, 2, 3, 5, 6, 7, 11, 12, 1, 4, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0};
    for (int base3 = 0; base3 < 2; base3++) {
      for (int i = 0; i < kLine * kLines; i++) {
        const int h = (int)(next_random(state) % 27), l = (int)(next_random(state) % 9);
        panel[i] = (uint8_t)(base3 ? 9 * h + l + h / 7 : h % 3 | h / 9 << 2 | l % 3 << 4 | l / 3 << 6);
      }
      for (int n = kLines - 3; n <= kLines; n++) {
        (base3 ? k.dot_lines_b3 : k.dot_lines_t2)(panel, kLine, kWhich, n, 2, x, dots);
        (base3 ? kScalar.dot_lines_b3 : kScalar.dot_lines_t2)(panel, kLine, kWhich, n, 2, x, dots + 64);
        if (memcmp(dots, dots + 64, n * sizeof *dots)) return "dot_lines";
        memset(line_sums, 1, sizeof line_sums);
        (base3 ? k.add_lines_b3 : k.add_lines_t2)(panel, kLine, kWhich, n, 2, x, line_sums[0]);
        (base3 ? kScalar.add_lines_b3 : kScalar.add_lines_t2)(panel, kLine, kWhich, n, 2, x, line_sums[1]);
        if (memcmp(line_sums[0], line_sums[1], sizeof line_sums[0])) return "add_lines";
      }
      for (int digit = 0; digit < 4 + base3; digit++) {
        memset(tiles1, 0, sizeof tiles1), memset(tiles2, 0, sizeof tiles2);
        (base3 ? k.unpack_columns_b3 : k.unpack_columns_t2)(panel + 64, kLine, 10, digit, tiles1, 256);
        (base3 ? kScalar.unpack_columns_b3 : kScalar.unpack_columns_t2)(panel + 64, kLine, 10, digit, tiles2, 256);
        if (memcmp(tiles1, tiles2, sizeof tiles1)) return "unpack_columns";
      }
    }

    uint64_t marks[2][3] = {};
    for (int i = 0; i < kInputs; i++) f1[i] = i % 5 ? f[i] : f[i] * 1e-22f, q1[i] = (int8_t)(next_random(state) % 3 - 1);  // squares that are zero, too
    for (int n = kInputs - 31; n <= kInputs; n += 31) {
      k.mark_gates(f1, n, marks[0]), kScalar.mark_gates(f1, n, marks[1]);
      if (memcmp(marks[0], marks[1], sizeof marks[0])) return "mark_gates";
      k.mark_codes(q1, n, marks[0]), kScalar.mark_codes(q1, n, marks[1]);
      if (memcmp(marks[0], marks[1], sizeof marks[0])) return "mark_codes";
    }

    constexpr int kDense = 80;  // inputs whose 32 rows fit into f
    for (int i = 0; i < kDense * 32; i++) memcpy(&brains[i], reinterpret_cast<const char*>(f + i) + 2, 2);  // bf16: the upper half
    const MultiplyDense dense[3][2] = {{k.multiply_f16, kScalar.multiply_f16}, {k.multiply_bf16, kScalar.multiply_bf16}, {k.multiply_f32, kScalar.multiply_f32}};
    const void* weights[3] = {halves, brains, f};
    for (int d = 0; d < 3; d++)
      for (int panels = 1; panels <= 2; panels++) {
        for (int m = 0; m < 2; m++) dense[d][m](weights[d], kDense * 16 * (d == 2 ? 4 : 2), panels, kDense, f, kInputs, kTokens, products[m]);
        for (int p = 0; p < panels; p++)
          if (memcmp(products[0] + p * kGemmTokens * 16, products[1] + p * kGemmTokens * 16, kTokens * 16 * sizeof(float))) return "multiply_dense";
      }
    const auto* codes = reinterpret_cast<const int16_t*>(halves);
    const auto* bytes = reinterpret_cast<const int8_t*>(halves);
    for (int n : {8, 12}) {  // 23 rows in two panels
      memcpy(y1, f, sizeof y1), memcpy(y2, f, sizeof y2);
      k.add_i16(codes, 23, n, f, 12, kTokens, y1, 32), kScalar.add_i16(codes, 23, n, f, 12, kTokens, y2, 32);
      if (memcmp(y1, y2, sizeof y1)) return "add_i16";
      memcpy(y1, f, sizeof y1), memcpy(y2, f, sizeof y2);
      k.add_i8(bytes, 23, n, f, 12, kTokens, y1, 32), kScalar.add_i8(bytes, 23, n, f, 12, kTokens, y2, 32);
      if (memcmp(y1, y2, sizeof y1)) return "add_i8";
    }
    for (int n : {64, 77, 83}) {
      k.dot_i16(codes, 15, 96, n, f, kInputs, 7, y1, 16), kScalar.dot_i16(codes, 15, 96, n, f, kInputs, 7, y2, 16);
      for (int t = 0; t < 7; t++)
        if (memcmp(y1 + 16 * t, y2 + 16 * t, 15 * sizeof(float))) return "dot_i16";
      k.dot_i8(bytes, 15, 96, n, f, kInputs, 7, y1, 16), kScalar.dot_i8(bytes, 15, 96, n, f, kInputs, 7, y2, 16);
      for (int t = 0; t < 7; t++)
        if (memcmp(y1 + 16 * t, y2 + 16 * t, 15 * sizeof(float))) return "dot_i8";
    }
    for (int n = kInputs; n >= kInputs - 7; n -= 7) {
      k.rms_norm(f, g, n, 1e-5f, f1), kScalar.rms_norm(f, g, n, 1e-5f, f2);
      if (memcmp(f1, f2, n * sizeof(float))) return "rms_norm";
      int32_t q1_sum, q2_sum;
      float s1 = k.quantize(f, n, q1, &q1_sum), s2 = kScalar.quantize(f, n, q2, &q2_sum);
      if (s1 != s2 || q1_sum != q2_sum || memcmp(q1, q2, n)) return "quantize";
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
    k.load_f16(halves, kInputs, f1), kScalar.load_f16(halves, kInputs, f2);
    if (memcmp(f1, f2, kInputs * sizeof(float))) return "load_f16";
    memcpy(f1, f, sizeof f1), memcpy(f2, f, sizeof f2);
    k.rotate(f1, 2, 37, g, g + 40), kScalar.rotate(f2, 2, 37, g, g + 40);
    if (memcmp(f1, f2, kInputs * sizeof(float))) return "rotate";
    for (int block : {4, 16, 32}) {  // 160 = 40 x 4 = 5 x 32
      k.hadamard(f1, kInputs, block), kScalar.hadamard(f2, kInputs, block);
      if (memcmp(f1, f2, kInputs * sizeof(float))) return "hadamard";
    }
    for (int i = 0; i < kInputs; i++) f1[i] = g[i] * g[i] * 1e-3f;  // weights and scales are not negative
    kScalar.store_f16(f1, kInputs, h1);
    for (int n = 16; n <= 64; n += 16) {
      float step1[2], step2[2];
      int32_t sum1[2], sum2[2];
      memset(q1, 0, sizeof q1), memset(q2, 0, sizeof q2);
      k.split_weights(f1, h1 + 64, n, q1, q1 + 64, step1, step1 + 1, sum1, sum1 + 1);
      kScalar.split_weights(f1, h1 + 64, n, q2, q2 + 64, step2, step2 + 1, sum2, sum2 + 1);
      if (memcmp(q1, q2, sizeof q1) || memcmp(step1, step2, sizeof step1) || memcmp(sum1, sum2, sizeof sum1)) return "split_weights";
    }
    constexpr int kQueries[] = {1, 2, 4, 7, 13};
    for (int queries : kQueries) {
      k.scores_f16(f, queries, halves, 9, 16, 0.125f, s1, 144), kScalar.scores_f16(f, queries, halves, 9, 16, 0.125f, s2, 144);
      if (memcmp(s1, s2, size_t(queries) * 144 * sizeof(float))) return "scores_f16";
      for (int n = 0; n < 13 * 144; n++) s1[n] = s2[n] = 0.25f;
      k.weigh_f16(f, 9, queries, halves, 7, 144, s1), kScalar.weigh_f16(f, 9, queries, halves, 7, 144, s2);
      if (memcmp(s1, s2, size_t(queries) * 144 * sizeof(float))) return "weigh_f16";
    }
    if (k.read_bytes(tiles2, sizeof tiles2) != kScalar.read_bytes(tiles2, sizeof tiles2)) return "read_bytes";
  }
  return nullptr;
}

}  // namespace

#if defined(__x86_64__)
const FetchAhead kFetchAhead = fetch_ahead();
#endif

int test_isas(IsaReport* reports) {
  Candidate candidates[kMaxIsas];
  int n = list_candidates(candidates);
  for (int i = 0; i < n; i++) {
    const Candidate& c = candidates[i];
    reports[i] = {c.kernels->name, c.supported, c.supported ? first_difference(*c.kernels) : nullptr};
  }
  return n;
}

const Kernels* choose_kernels(const Candidate* candidates, int n, const char* wanted, const char** failed) {
  static std::atomic<const Kernels*> sound{nullptr};  // what passed last in this process: the test takes 3 ms, and each model asks twice
  *failed = nullptr;
  for (int i = 0; i < n; i++) {
    const Candidate& c = candidates[i];
    if (!c.supported || (wanted && strcmp(wanted, c.kernels->name))) continue;
    if (sound.load(std::memory_order_relaxed) == c.kernels || !first_difference(*c.kernels)) {
      sound.store(c.kernels, std::memory_order_relaxed);
      return c.kernels;
    }
    if (!*failed) *failed = c.kernels->name;
  }
  return nullptr;
}

const Kernels* choose_kernels(const char* wanted, const char** failed) {
  Candidate candidates[kMaxIsas];
  const int n = list_candidates(candidates);
  return choose_kernels(candidates, n, wanted, failed);
}

}  // namespace bitnet
