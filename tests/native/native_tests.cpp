// The native core without Python, so that the sanitizers see all of it: kernels against the scalar ones over the grid of
// sizes, the thread pool, and the forward pass of a small random model in every arrangement of its batch.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "amx_emulation.h"
#define BITNET_EMULATED_AMX
#include "../../native/kernels/amx.cpp"
#include "forward.h"
#include "repack.h"

using namespace bitnet;

namespace {
int failures = 0;

void check(bool ok, const char* what, const char* isa, int a = 0, int b = 0) {
  if (ok) return;
  failures++;
  std::printf("FAILED: %s (%s, %d, %d)\n", what, isa, a, b);
}

std::mt19937 rng(7);
float normal() { return std::normal_distribution<float>()(rng); }

constexpr Scheme kIntegerSchemes[] = {Scheme::ternary, Scheme::ternary_base3, Scheme::binary, Scheme::int4, Scheme::fp4, Scheme::int8};
int8_t random_weight(Scheme s) {
  const CodeLayout codes = layout(s);
  while (true)
    if (const unsigned code = unsigned(rng() % (codes.top + 1)); bits_of_code(s, code) >= 0) return int8_t(int(code) - codes.bias);
}

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
  IsaReport reports[kMaxIsas];
  for (int i = 0, n = test_isas(reports); i < n; i++) {
    const char* failed = nullptr;
    check(!reports[i].failure, "self-test", reports[i].name);
    if (!reports[i].supported) continue;
    if (const Kernels* k = choose_kernels(reports[i].name, &failed)) found.push_back(k);
  }
  const char* failed = nullptr;
  check(choose_kernels("no such set", &failed) == nullptr, "an unknown name is refused", "");
  return found;
}

// Kernels that lie are found out at start-up, named, and replaced by the next best: one that does nothing in each place of the table in
// turn, and some that are wrong in one bit, or by saturating.
void test_lies(const std::vector<const Kernels*>& isas) {
  static const Kernels* honest;
  honest = isas.size() > 1 ? isas[isas.size() - 2] : &kScalar;  // the simplest that is not the reference itself
  auto found_out = [&](Kernels lying, const char* what, int place) {
    static std::vector<std::unique_ptr<Kernels>> kept;  // a table's address must stay its own
    lying.name = "lying";
    kept.push_back(std::make_unique<Kernels>(lying));
    const Candidate candidates[] = {{kept.back().get(), false}, {kept.back().get(), true}, {honest, true}, {&kScalar, true}};
    const char* failed = nullptr;
    check(choose_kernels(candidates, 4, nullptr, &failed) == honest && failed && !std::strcmp(failed, "lying"), what, honest->name, place);
    check(choose_kernels(candidates, 4, "lying", &failed) == nullptr && failed && !std::strcmp(failed, "lying"), what, "asked for", place);
  };
  using Function = void (*)();
  const Function nothing = [] {};
  constexpr size_t kFirst = offsetof(Kernels, multiply_t2);  // from here on there are functions only
  constexpr int kPlaces = int((sizeof(Kernels) - kFirst) / sizeof(Function));
  for (int place = 0; place < kPlaces; place++) {
    Kernels lying = *honest;
    char* at = reinterpret_cast<char*>(&lying) + kFirst + place * sizeof(Function);
    Function before;
    std::memcpy(&before, at, sizeof before);
    if (!before) continue;
    std::memcpy(at, &nothing, sizeof nothing);
    found_out(lying, "a kernel that does nothing is found out", place);
  }
  Kernels lying = *honest;
  lying.multiply_t2 = [](const IntegerMatrix& w, const QuantizedRows& x, int first, int n, float* y) {
    honest->multiply_t2(w, x, first, n, y);
    float& last = y[size_t(x.n_tokens) * w.rows - 1];
    last = std::nextafter(last, 1e9f);
  };
  found_out(lying, "one bit of a product is found out", 0);
  lying = *honest;
  lying.sum_i8 = [](const int8_t* q, int n) { return std::clamp(honest->sum_i8(q, n), -32768 / 4, 32767 / 4); };
  found_out(lying, "saturation is found out", 0);
  lying = *honest;
  lying.quantize = [](const float* x, int n, int8_t* q, int32_t* sum) {
    const float step = honest->quantize(x, n, q, sum);
    q[n - 1] ^= 1;
    return step;
  };
  found_out(lying, "one bit of a code is found out", 0);
  const Candidate liars[] = {{&lying, true}};
  const char* failed = nullptr;
  check(choose_kernels(liars, 1, nullptr, &failed) == nullptr && failed, "where all lie, none runs", "");
}

// What ternary.py defines, in 64-bit integers.
void reference(const std::vector<int8_t>& codes, const std::vector<float>& scales, int rows, int cols, int groups, int step_group, const QuantizedRows& x,
               float* y) {
  const int group = groups == 1 ? cols : ((cols + groups - 1) / groups + 15) / 16 * 16;
  for (int t = 0; t < x.n_tokens; t++)
    for (int r = 0; r < rows; r++) {
      float sum = 0;
      int64_t dot = 0;
      for (int c = 0; c < cols; c++) {
        dot += int64_t{codes[size_t(r) * cols + c]} * x.q[t * x.stride + c];
        if (c + 1 < cols && (c + 1) % group && (!step_group || (c + 1) % step_group)) continue;  // the run goes on
        const float scaled = float(int32_t(dot)) * scales[size_t(r) * groups + c / group];
        sum = sum + (step_group ? scaled * x.steps[t * x.n_steps + c / step_group] : scaled);
        dot = 0;
      }
      y[size_t(t) * rows + r] = step_group ? sum : sum * x.steps[t];
    }
}

void test_matmul(const std::vector<const Kernels*>& isas) {
  struct Case { int rows, cols, groups, tokens; };
  const char* kNames[] = {"two-bit", "base-3", "binary", "int4", "fp4", "int8"};
  const Case cases[] = {{1, 1, 1, 1},    {16, 16, 1, 1},   {17, 33, 1, 2},   {40, 100, 1, 5},   {48, 256, 2, 9},
                        {64, 400, 4, 7}, {16, 2048, 1, 1}, {33, 512, 16, 64}, {16, 16384, 1, 3}, {16, 16384, 128, 2}};
  for (const Case& c : cases)
    for (Scheme scheme : kIntegerSchemes)
      for (int extreme = 0; extreme < 2; extreme++) {
        std::vector<int8_t> codes(size_t(c.rows) * c.cols);
        std::vector<float> scales(size_t(c.rows) * c.groups), x(size_t(c.tokens) * c.cols), expected(size_t(c.tokens) * c.rows), y(expected.size());
        const int top = layout(scheme).top - layout(scheme).bias;
        for (int8_t& v : codes) v = extreme ? int8_t(top) : random_weight(scheme);
        for (float& v : scales) v = c.groups % 4 == 0 ? float(int(rng() % 4096)) / 64 - 32 : normal();  // of f16, or not
        for (float& v : x) v = extreme ? -3.0f : normal();
        Linear w = repack_integer(scheme, codes.data(), scales.data(), c.rows, c.cols, c.groups);
        for (const Kernels* k : isas)
          for (int step_group : {0, 48, 64}) {
            const int per_vector = layout(scheme).inputs();
            if (step_group && (step_group % per_vector || (c.groups > 1 && w.group % per_vector))) continue;  // refused: it may cut a vector
            ThreadPool pool(step_group ? 3 : 1);
            Activations in(step_group);
            in.set(x.data(), c.tokens, c.cols);
            matmul(*k, pool, w, in, y.data());
            reference(codes, scales, c.rows, c.cols, c.groups, step_group, in.rows(0, c.tokens), expected.data());
            check(y == expected, kNames[int(scheme)], k->name, c.rows, c.cols);
          }
        std::vector<float> row(c.cols);
        dequantize_row(*isas[0], w, c.rows - 1, row.data());
        const int group = w.group;
        for (int i = 0; i < c.cols; i++)
          check(row[i] == codes[size_t(c.rows - 1) * c.cols + i] * scales[size_t(c.rows - 1) * c.groups + i / group], "dequantize_row", "", i);
      }
}

// The largest sums: as many inputs as kernels.h allows, every code the largest or the smallest, every activation -128 or 127.
void test_bounds(const std::vector<const Kernels*>& isas) {
  constexpr int kInputs = 65536, kTokens = 15;
  std::vector<int8_t> x(size_t(round_up(kTokens, 16)) * kInputs + kSlack);
  const std::vector<float> ones(kTokens * 16, 1.0f);
  const std::vector<int32_t> no_sums(kTokens);
  std::vector<int32_t> dots(kGemmTokens * 16);
  for (int value : {-128, 127}) {
    std::fill(x.begin(), x.end(), int8_t(value));
    for (Scheme scheme : {Scheme::ternary, Scheme::ternary_base3, Scheme::binary, Scheme::int4, Scheme::fp4, Scheme::int8})
      for (int code : {layout(scheme).top, 0}) {
        const int per_vector = layout(scheme).inputs(), vectors = kInputs / per_vector;
        int byte = code;  // of vectors that hold the code everywhere
        if (scheme == Scheme::ternary) byte = 0x55 * code;
        else if (scheme == Scheme::ternary_base3) byte = code ? 9 * 26 + 8 + 26 / 7 : 0;
        else if (scheme == Scheme::binary) byte = code ? 0xff : 0;
        else if (scheme == Scheme::int4) byte = 0x11 * code;
        else if (scheme == Scheme::fp4) byte = code ? 0x77 : 0xff;  // 6 and -6
        const std::vector<uint8_t> panel(size_t(vectors) * 64 + kSlack, uint8_t(byte)), tiles(size_t(kInputs) * 16 + kSlack, uint8_t(code));
        const Run run{0, kInputs, 0, vectors, 0, 0};
        const IntegerMatrix w{panel.data(), 0, ones.data(), nullptr, 0, 16, 0};
        for (const Kernels* k : isas) {
          if (!std::strcmp(k->name, "scalar") && isas.size() > 1) continue;  // it sums one by one, in 32 bits
          const auto [multiply, gemm] = [&]() -> std::pair<MultiplyInteger, GemmInteger> {
            switch (scheme) {
              case Scheme::ternary: return {k->multiply_t2, k->gemm_ternary};
              case Scheme::ternary_base3: return {k->multiply_b3, k->gemm_ternary};
              case Scheme::binary: return {k->multiply_b1, k->gemm_ternary};
              case Scheme::int4: return {k->multiply_i4, k->gemm_i4};
              case Scheme::fp4: return {k->multiply_fp4, k->gemm_fp4};
              default: return {k->multiply_i8, k->gemm_i8};
            }
          }();
          std::vector<float> y(kTokens * 16);
          multiply(w, {x.data(), kInputs, &run, 1, no_sums.data(), ones.data(), 1, false, kTokens}, 0, 1, y.data());
          const int64_t expected = int64_t{vectors} * per_vector * code * value;
          for (float v : y) check(v == float(expected), "the largest sums", k->name, code, value);
          if (!gemm) continue;
          if (k->begin_gemm) k->begin_gemm(kInputs - 16, kTokens);
          gemm(tiles.data(), 0, 1, kInputs - 16, x.data(), kInputs, kTokens, true, true, dots.data());
          if (k->end_gemm) k->end_gemm();
          for (int i = 0; i < kTokens * 16; i++) check(dots[i] == int64_t{kInputs - 16} * code * value, "the largest sums of gemm", k->name, code, value);
        }
      }
  }
}

bool same(const Linear& a, const Linear& b) {
  return a.panels.size() == b.panels.size() && !std::memcmp(a.panels.data(), b.panels.data(), a.panels.size()) &&
         a.scales.size() == b.scales.size() && std::equal(a.scales.data(), a.scales.data() + a.scales.size(), b.scales.data()) && a.scales_lie == b.scales_lie;
}

// Stored bytes into panels, in memory of exactly their size, against one code at a time.
void test_repack() {
  struct Case { int rows, cols; };
  for (const Case& c : {Case{1, 1}, {3, 7}, {16, 16}, {18, 33}, {64, 130}, {37, 1285}, {256, 256}, {70, 2560}})
    for (int threads : {1, 3}) {
      ThreadPool pool(threads);
      const size_t n = size_t(c.rows) * c.cols;
      const int band = (c.rows + 3) / 4, cut = c.rows / 32 * 16;  // two runs of rows
      std::vector<int8_t> trits(n), codes(n);
      std::vector<float> scales(c.rows);
      std::vector<uint8_t> banded(size_t(band) * c.cols);
      for (int8_t& v : trits) v = int8_t(int(rng() % 3) - 1);
      for (float& v : scales) v = normal();
      for (int r = 0; r < c.rows; r++)
        for (int i = 0; i < c.cols; i++) banded[size_t(r % band) * c.cols + i] |= uint8_t((trits[size_t(r) * c.cols + i] + 1) << 2 * (r / band));
      for (Scheme scheme : kIntegerSchemes) {
        for (int8_t& v : codes) v = random_weight(scheme);
        Linear expected = repack_integer(scheme, codes.data(), scales.data(), c.rows, c.cols, 1), w = empty_linear(scheme, c.rows, c.cols, 1);
        prefault(pool, w);
        for (int first : {0, cut})
          if (int rows = first ? c.rows - cut : cut ? cut : c.rows) {
            fill_codes(pool, w, first, rows, codes.data() + size_t(first) * c.cols), set_scales(w, first, rows, scales.data() + first);
            if (!cut) break;
          }
        compact_scales(w, nullptr);
        check(same(w, expected), "fill_codes", "", c.rows, c.cols);
      }
      Linear expected = repack_integer(Scheme::ternary, trits.data(), scales.data(), c.rows, c.cols, 1), w = empty_linear(Scheme::ternary, c.rows, c.cols, 1);
      set_scales(w, 0, c.rows, scales.data()), compact_scales(w, nullptr);
      check(fill_banded(pool, w, banded.data()) && same(w, expected), "fill_banded", "", c.rows, c.cols);
      banded.back() |= 3;
      check(!fill_banded(pool, w, banded.data()), "a code of 3", "", c.rows, c.cols);
      if (c.cols % 64 == 0) {
        std::vector<uint8_t> blocks(n / 64 * 18);
        for (size_t i = 0; i < n; i++) blocks[i / 64 * 18 + 2 + i % 64 / 4] |= uint8_t((trits[i] + 1) << 2 * (i % 4));
        check(fill_two_bit(pool, w, 0, c.rows, blocks.data(), {64, 18, 2, 1, false}) && same(w, expected), "fill_two_bit", "", c.rows, c.cols);
      }
      for (DenseType type : {DenseType::f16, DenseType::bf16, DenseType::f32}) {
        const Scheme scheme = type == DenseType::f16 ? Scheme::f16 : type == DenseType::bf16 ? Scheme::bf16 : Scheme::f32;
        std::vector<uint8_t> values(n * (type == DenseType::f32 ? 4 : 2));
        for (size_t i = 0; i < values.size(); i++) values[i] = uint8_t(rng() % 0x7b);  // no exponent of ones
        Linear dense = empty_linear(scheme, c.rows, c.cols, 1), int8 = empty_linear(Scheme::int8, c.rows, c.cols, 1);
        check(fill_values(pool, dense, 0, c.rows, type, values.data()) && same(dense, repack_dense(scheme, values.data(), c.rows, c.cols)), "fill_values", "", c.rows, c.cols);
        check(fill_values(pool, int8, 0, c.rows, type, values.data()), "quantized", "", c.rows, c.cols);
        for (Scheme scheme : {Scheme::binary, Scheme::int4, Scheme::fp4}) {
          Linear w = empty_linear(scheme, c.rows, c.cols, 1);
          check(fill_values(pool, w, 0, c.rows, type, values.data()) || scheme != Scheme::binary, "quantized", "", c.rows, c.cols);  // scales may be beyond f16
        }
        std::fill(values.end() - values.size() / n, values.end(), 0xff);
        check(!fill_values(pool, dense, 0, c.rows, type, values.data()) && !fill_values(pool, int8, 0, c.rows, type, values.data()), "not finite", "", c.rows, c.cols);
      }
    }
}

// The AMX kernel over an emulation of its instructions, against the scalar one: every step, one and two panels, 1 to 32 tokens.
void test_amx_in_emulation() {
  for (int inputs : {16, 32, 48, 64, 96, 160, 192, 320}) {
    std::vector<uint8_t> codes(2 * 16 * inputs);
    std::vector<int8_t> x(size_t(kGemmTokens) * 320);
    for (uint8_t& c : codes) c = uint8_t(rng());
    for (int8_t& v : x) v = int8_t(rng());
    for (int n = 1; n <= kGemmTokens; n += n % 16 == 15 ? 1 : 7)
      for (int panels = 1; panels <= 2; panels++) {
        std::vector<int32_t> out(2 * kGemmTokens * 16), expected(kGemmTokens * 16);
        begin(inputs, n);
        gemm_u8_i8_amx(codes.data(), 16 * inputs, panels, inputs, x.data(), 320, n, true, true, out.data());
        end();
        for (int p = 0; p < panels; p++) {
          for (int t = 0; t < n; t++)
            for (int row = 0; row < 16; row++) {
              int32_t dot = 0;
              for (int i = 0; i < inputs; i++) dot += codes[p * 16 * inputs + 16 * (i / 4 * 4) + 4 * row + i % 4] * x[t * 320 + i];
              expected[t * 16 + row] = dot;
            }
          check(std::equal(expected.begin(), expected.begin() + n * 16, out.begin() + p * kGemmTokens * 16), "gemm", "emulated amx", inputs, n);
        }
      }
  }
}

void test_threads() {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 300; round++) {
      const int n = round % 37;
      std::vector<std::atomic<int>> seen(n);
      pool.run(n, [&](int i, int t) { seen[i] += t >= 0 && t < threads ? 1 : 100; });
      for (int i = 0; i < n; i++) check(seen[i] == 1, "every item once", "threads", threads, i);
    }
  }
}

void fill(Model& m) {
  const Config& c = m.config;
  auto dense = [&](const std::string& name, Scheme s, int rows, int cols) { m.set_linear(name, random_linear(*m.kernels, s, rows, cols, 1, rng())); };
  auto ones = [&](const std::string& name, int n) {
    std::vector<float> v(n);
    for (float& f : v) f = 1 + 0.1f * normal();
    m.set_vector(name, v.data(), n);
  };
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  dense("embedding", Scheme::f16, c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.n_layers; i++) {
    const std::string at = "layers." + std::to_string(i) + ".";
    dense(at + "q", Scheme::binary, q, c.hidden_size), dense(at + "k", Scheme::ternary, kv, c.hidden_size);
    dense(at + "v", c.activation_group ? Scheme::fp4 : Scheme::int8, kv, c.hidden_size), dense(at + "o", Scheme::bf16, c.hidden_size, q);
    dense(at + "gate", Scheme::ternary, c.ffn_size, c.hidden_size), dense(at + "up", Scheme::f16, c.ffn_size, c.hidden_size);
    dense(at + "down", c.activation_group ? Scheme::int4 : Scheme::ternary_base3, c.hidden_size, c.ffn_size);
    ones(at + "attn_norm", c.hidden_size), ones(at + "ffn_norm", c.hidden_size), ones(at + "q_bias", q), ones(at + "down_bias", c.hidden_size);
    if (c.sub_norms) ones(at + "attn_sub_norm", q), ones(at + "ffn_sub_norm", c.ffn_size);
    if (c.post_norms) ones(at + "post_attn_norm", c.hidden_size), ones(at + "post_ffn_norm", c.hidden_size);
    if (c.qk_norms) ones(at + "q_norm", c.head_dim), ones(at + "k_norm", c.head_dim);
  }
  ones("final_norm", c.hidden_size), ones("rope_inverse", c.head_dim / 2);
  if (c.sliding_window) ones("rope_inverse_local", c.head_dim / 2);
}

// Beside some matrices only, of ranks that are no multiple of 4, which A's rows of zeros fill up.
void fill(Adapter& adapter, int rank) {
  const Config& c = adapter.config();
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim, padded = (rank + 3) / 4 * 4;
  auto values = [&](int rows, int kept, int cols) {
    std::vector<int16_t> v(size_t(rows) * cols);
    for (int i = 0; i < kept * cols; i++) v[i] = int16_t(int(rng() % 65535) - 32767);
    return v;
  };
  auto set = [&](int layer, std::initializer_list<std::pair<const char*, int>> parts, int cols) {
    const int ranks = padded * int(parts.size());
    const std::vector<float> scales(ranks, 1e-11f);
    adapter.set_a(layer, parts.begin()->first, values(ranks, ranks - padded + rank, cols).data(), ranks, cols, scales.data());
    int first = 0;
    for (auto [part, rows] : parts) adapter.set_b(layer, part, values(rows, rows, rank).data(), rows, rank, first), first += padded;
  };
  set(0, {{"q", q}, {"v", kv}}, c.hidden_size), set(0, {{"o", c.hidden_size}}, q), set(1, {{"k", kv}}, c.hidden_size);
  set(1, {{"gate", c.ffn_size}, {"up", c.ffn_size}}, c.hidden_size), set(1, {{"down", c.hidden_size}}, c.ffn_size);
}

bool run(Model& m, std::vector<Span> batch, bool all, std::vector<float>& logits, size_t rows) {
  logits.assign(rows * m.config.vocab_size, -1);
  return forward(m, batch, all, logits.data(), [] { return false; });
}

// Logits of 300 tokens by every instruction set: the same bits in every arrangement; returns their checksum, to compare machines.
uint64_t test_forward(const std::vector<const Kernels*>& isas, const Config& c, const KvFormat& format = {}) {
  std::vector<int32_t> ids(300);
  for (int32_t& id : ids) id = int32_t(rng() % c.vocab_size);
  std::vector<float> first, first_adapted;
  for (const Kernels* k : isas)
    for (int threads : {1, 3}) {
      rng.seed(11);
      Model m(c, {false, c.sliding_window > 0}, threads, k);
      fill(m);
      m.check_complete();
      std::vector<float> whole, step, part;
      KvCache a(c, format), b(c, format), d(c, format);
      check(run(m, {{&a, ids.data(), 300}}, true, whole, 300), "forward finishes", k->name);
      for (float v : whole) check(std::isfinite(v), "finite logits", k->name);
      if (first.empty()) first = whole;
      check(whole == first, "same bits for every instruction set and number of threads", k->name, threads);
      for (int at = 0; at < 300; at += 1 + at % 70) {  // one sequence in chunks, another beside it in the same batch
        const int n = std::min(1 + at % 70, 300 - at), other = at % 3 + 1;
        run(m, {{&b, ids.data() + at, n}, {&d, ids.data(), other}}, true, part, n + other);
        check(std::equal(part.begin(), part.begin() + n * c.vocab_size, whole.begin() + at * c.vocab_size), "same bits in chunks and batches", k->name, at);
      }
      Adapter one(c), other(c);
      fill(one, 3), fill(other, 8);
      KvCache e(c, format), f(c), g(c, format), h(c, format);  // f in f16, in the same batches
      std::vector<float> adapted, adapted2;
      run(m, {{&e, ids.data(), 300, &one}}, true, adapted, 300), run(m, {{&f, ids.data(), 300, &other}}, true, adapted2, 300);
      if (first_adapted.empty()) first_adapted = adapted;
      check(adapted == first_adapted, "same bits of an adapter for every instruction set and number of threads", k->name, threads);
      check(adapted != whole && adapted2 != whole && adapted2 != adapted, "an adapter changes the logits", k->name);
      e.truncate(0), f.truncate(0);
      for (int at = 0; at < 300; at += 1 + at % 70) {  // several adapters and none in one batch
        const int n = std::min(1 + at % 70, 300 - at);
        g.truncate(at), h.truncate(0);
        run(m, {{&g, ids.data() + at, n}, {&e, ids.data() + at, n, &one}, {&h, ids.data(), 2, &one}, {&f, ids.data() + at, n, &other}}, true, part, 3 * n + 2);
        auto same = [&](int row, int rows, const std::vector<float>& whole, int from) {
          return std::equal(part.begin() + row * c.vocab_size, part.begin() + (row + rows) * c.vocab_size, whole.begin() + from * c.vocab_size);
        };
        check(same(0, n, whole, at) && same(n, n, adapted, at) && same(2 * n, 2, adapted, 0) && same(2 * n + 2, n, adapted2, at),
              "same bits with several adapters in a batch", k->name, at);
      }
      b.truncate(256);
      run(m, {{&b, ids.data() + 256, 44}}, false, step, 1);
      check(std::equal(step.begin(), step.end(), whole.end() - c.vocab_size), "same bits after truncation", k->name);
      KvCache shared(c, format);  // the first 270 tokens of a's pages, of which it must copy one before it writes
      shared.share(a.pages(), 270);
      run(m, {{&shared, ids.data(), 9}, {&a, ids.data(), 9}}, true, part, 18);
      a.truncate(300), shared.truncate(270);
      run(m, {{&shared, ids.data() + 270, 30}, {&a, ids.data(), 9}}, true, part, 39);
      check(std::equal(part.begin(), part.begin() + 30 * c.vocab_size, whole.begin() + 270 * c.vocab_size), "same bits by shared pages", k->name);
      a.truncate(270);
      run(m, {{&a, ids.data() + 270, 30}}, true, part, 30);
      check(std::equal(part.begin(), part.end(), whole.begin() + 270 * c.vocab_size), "who shares writes to nobody", k->name);
      const int before = b.length();
      std::vector<Span> again = {{&b, ids.data(), 5}};
      check(!forward(m, again, false, step.data(), [] { return true; }) && b.length() == before, "an interrupted forward appends nothing", k->name);
    }
  uint64_t sum = 0xcbf29ce484222325;  // FNV-1a
  for (float v : first) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    sum = (sum ^ bits) * 0x100000001b3;
  }
  return sum;
}
// up_proj in rows and down_proj in columns: back and forth gives the same bytes, and logits the same bits for any number of tokens.
void test_zero_skipping(const std::vector<const Kernels*>& isas) {
  for (Scheme scheme : {Scheme::ternary, Scheme::ternary_base3})
    for (auto [hidden, ffn] : {std::pair{48, 80}, {40, 70}, {320, 700}})
      for (const Kernels* k : isas)
        for (int threads : {1, 3}) {
          Config c{.n_layers = 2, .vocab_size = 50, .hidden_size = hidden, .ffn_size = ffn, .n_heads = 4, .n_kv_heads = 2, .head_dim = 10,
                   .max_context = 300, .norm_eps = 1e-5f, .activation = Activation::relu2, .attention_scale = 0.3f, .sub_norms = hidden != 48};
          rng.seed(5);
          Model m(c, {false, false}, threads, k);
          fill(m);
          for (int i = 0; i < 2; i++) {
            const std::string at = "layers." + std::to_string(i) + ".";
            m.set_linear(at + "up", random_linear(*k, scheme, ffn, hidden, 1, rng(), nullptr, Lie::rows));
            m.set_linear(at + "down", random_linear(*k, scheme, hidden, ffn, 1, rng(), nullptr, Lie::columns));
            std::vector<float> bias(ffn, i ? -0.8f : -3.0f);  // some zeros, nearly all
            m.set_vector(at + "gate_bias", bias.data(), ffn);
            if (hidden == 40) m.set_vector(at + "up_bias", bias.data(), ffn);
          }
          m.check_complete();
          std::vector<int32_t> ids(60);
          for (int32_t& id : ids) id = int32_t(rng() % 50);
          std::vector<std::vector<uint8_t>> before, after;
          auto bytes = [&](std::vector<std::vector<uint8_t>>& to) {
            for (const Layer& l : m.layers)
              for (const Linear* w : {&l.up, &l.down}) to.emplace_back(w->panels.data(), w->panels.data() + w->laid_bytes());
          };
          std::vector<float> dense, part;
          KvCache a(c), b(c), d(c);
          check(run(m, {{&a, ids.data(), 60}}, true, dense, 60), "forward finishes", k->name);
          m.skip_zeros(true), m.skip_zeros(false);  // from here on zeros lie beyond the matrices, where random ones had anything
          bytes(before);
          m.skip_zeros(true);
          m.zeros.assign(2, Zeros{});
          for (int at = 0, step = 1; at < 60; at += step, step = step % 9 + 1) {
            const int n = std::min(step, 60 - at), other = at % 2 + 1;
            run(m, {{&b, ids.data() + at, n}, {&d, ids.data(), other}}, true, part, n + other);
            check(std::equal(part.begin(), part.begin() + n * 50, dense.begin() + at * 50), "same bits with zeros skipped", k->name, hidden, at);
            d.truncate(0);
          }
          b.truncate(0);
          run(m, {{&b, ids.data(), 60}}, true, part, 60);
          check(part == dense, "same bits of many tokens by rows and columns", k->name, hidden);
          for (int at = 0; at < 60; at++) {
            b.truncate(at);
            run(m, {{&b, ids.data() + at, 1}}, true, part, 1);
            check(std::equal(part.begin(), part.end(), dense.begin() + at * 50), "same bits token by token", k->name, hidden, at);
          }
          check(m.profile.up_rows_read < m.profile.up_rows && m.profile.down_columns_read < m.profile.down_columns, "something is skipped", k->name);
          check(m.zeros[1].gates > 0 && m.zeros[1].inputs >= m.zeros[1].gates && m.zeros[1].inputs < m.zeros[1].values, "zeros are counted", k->name);
          m.skip_zeros(false);
          bytes(after);
          check(before == after, "back to the same bytes", k->name, hidden);
        }
}
}  // namespace

int main() {
  const auto isas = runnable();
  test_lies(isas);
  test_matmul(isas);
  test_bounds(isas);
  test_repack();
  test_amx_in_emulation();
  test_threads();
  Config c{.n_layers = 2, .vocab_size = 50, .hidden_size = 48, .ffn_size = 80, .n_heads = 4, .n_kv_heads = 2, .head_dim = 12,
           .max_context = 700, .norm_eps = 1e-5f, .activation = Activation::relu2, .attention_scale = 0.3f, .sub_norms = true};
  const uint64_t first = test_forward(isas, c), four_bits = test_forward(isas, c, {4, 4, 0, true});
  c.activation = Activation::gelu_tanh, c.sub_norms = false, c.post_norms = c.qk_norms = true, c.sliding_window = 70;
  c.embedding_scale = 7, c.activation_group = 32;
  std::string names;
  for (const Kernels* k : isas) names += (names.empty() ? "" : ", ") + std::string(k->name);
  const uint64_t second = test_forward(isas, c);
  c.head_dim = 32;
  const uint64_t mixed = test_forward(isas, c, {8, 4, 16, true});
  std::printf("logits %016" PRIx64 " %016" PRIx64 " %016" PRIx64 " %016" PRIx64 "\n", first, second, four_bits, mixed);  // the same on every machine
  test_zero_skipping(isas);
  std::printf("%s on %s: %d failures\n", failures ? "FAILED" : "passed", names.c_str(), failures);
  return failures ? 1 : 0;
}
