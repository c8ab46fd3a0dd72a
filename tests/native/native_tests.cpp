// The native core without Python, so that the sanitizers see all of it: kernels against the scalar ones over the grid of
// sizes, the thread pool, and the forward pass of a small random model in every arrangement of its batch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

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
  const char* kNames[] = {"two-bit", "base-3", "int4", "int8"};
  const Case cases[] = {{1, 1, 1, 1},    {16, 16, 1, 1},   {17, 33, 1, 2},   {40, 100, 1, 5},   {48, 256, 2, 9},
                        {64, 400, 4, 7}, {16, 2048, 1, 1}, {33, 512, 16, 64}, {16, 16384, 1, 3}, {16, 16384, 128, 2}};
  for (const Case& c : cases)
    for (Scheme scheme : {Scheme::ternary, Scheme::ternary_base3, Scheme::int4, Scheme::int8})
      for (int extreme = 0; extreme < 2; extreme++) {
        std::vector<int8_t> codes(size_t(c.rows) * c.cols);
        std::vector<float> scales(size_t(c.rows) * c.groups), x(size_t(c.tokens) * c.cols), expected(size_t(c.tokens) * c.rows), y(expected.size());
        const int top = scheme == Scheme::int8 ? 127 : scheme == Scheme::int4 ? 7 : 1;
        for (int8_t& v : codes) v = int8_t(extreme ? top : int(rng() % (2 * top + 1)) - top);
        for (float& v : scales) v = c.groups % 4 == 0 ? float(int(rng() % 4096)) / 64 - 32 : normal();  // of f16, or not
        for (float& v : x) v = extreme ? -3.0f : normal();
        Linear w = repack_integer(scheme, codes.data(), scales.data(), c.rows, c.cols, c.groups);
        for (const Kernels* k : isas)
          for (int step_group : {0, 48, 64}) {
            if (step_group && scheme == Scheme::ternary_base3) continue;
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

bool same(const Linear& a, const Linear& b) {
  return a.panels.size() == b.panels.size() && !std::memcmp(a.panels.data(), b.panels.data(), a.panels.size()) &&
         a.scales.size() == b.scales.size() && std::equal(a.scales.data(), a.scales.data() + a.scales.size(), b.scales.data());
}

// Stored bytes into panels, in memory of exactly their size, against one code at a time.
void test_repack() {
  struct Case { int rows, cols; };
  for (const Case& c : {Case{1, 1}, {3, 7}, {16, 16}, {18, 33}, {64, 130}, {37, 1285}, {256, 256}, {70, 2560}})
    for (int threads : {1, 3}) {
      ThreadPool pool(threads);
      const size_t n = size_t(c.rows) * c.cols;
      const int band = (c.rows + 3) / 4, cut = c.rows / 32 * 16;  // two runs of rows
      std::vector<int8_t> trits(n), wide(n);
      std::vector<float> scales(c.rows);
      std::vector<uint8_t> banded(size_t(band) * c.cols);
      for (int8_t& v : trits) v = int8_t(int(rng() % 3) - 1);
      for (int8_t& v : wide) v = int8_t(rng());
      for (float& v : scales) v = normal();
      for (int r = 0; r < c.rows; r++)
        for (int i = 0; i < c.cols; i++) banded[size_t(r % band) * c.cols + i] |= uint8_t((trits[size_t(r) * c.cols + i] + 1) << 2 * (r / band));
      for (Scheme scheme : {Scheme::ternary, Scheme::ternary_base3, Scheme::int4, Scheme::int8}) {
        std::vector<int8_t> codes = scheme < Scheme::int4 ? trits : wide;
        if (scheme == Scheme::int4)
          for (int8_t& v : codes) v = int8_t(v >> 4);
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
        Linear int4 = empty_linear(Scheme::int4, c.rows, c.cols, 1);
        fill_values(pool, int4, 0, c.rows, type, values.data());  // its scales may be beyond f16
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
    dense(at + "q", Scheme::ternary, q, c.hidden_size), dense(at + "k", Scheme::ternary, kv, c.hidden_size);
    dense(at + "v", Scheme::int8, kv, c.hidden_size), dense(at + "o", Scheme::bf16, c.hidden_size, q);
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
void fill(Adapter& adapter, Scheme scheme, int rank) {
  const Config& c = adapter.config();
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim, padded = (rank + 3) / 4 * 4;
  auto values = [&](int rows, int kept, int cols) {
    std::vector<float> v(size_t(rows) * cols);
    for (int i = 0; i < kept * cols; i++) v[i] = 0.1f * normal();
    std::vector<uint16_t> halves(round_up(int(v.size()), 16));
    if (scheme == Scheme::f32) return std::vector<uint8_t>(reinterpret_cast<uint8_t*>(v.data()), reinterpret_cast<uint8_t*>(v.data() + v.size()));
    v.resize(halves.size());
    kScalar.store_f16(v.data(), int(v.size()), halves.data());
    return std::vector<uint8_t>(reinterpret_cast<uint8_t*>(halves.data()), reinterpret_cast<uint8_t*>(halves.data() + size_t(rows) * cols));
  };
  auto set = [&](int layer, std::initializer_list<std::pair<const char*, int>> parts, int cols) {
    const int ranks = padded * int(parts.size());
    const std::vector<float> scales(ranks, 1.5f);
    adapter.set_a(layer, parts.begin()->first, scheme, values(ranks, ranks - padded + rank, cols).data(), ranks, cols, scales.data());
    int first = 0;
    for (auto [part, rows] : parts) adapter.set_b(layer, part, scheme, values(rows, rows, rank).data(), rows, rank, first), first += padded;
  };
  set(0, {{"q", q}, {"v", kv}}, c.hidden_size), set(0, {{"o", c.hidden_size}}, q), set(1, {{"k", kv}}, c.hidden_size);
  set(1, {{"gate", c.ffn_size}, {"up", c.ffn_size}}, c.hidden_size), set(1, {{"down", c.hidden_size}}, c.ffn_size);
}

bool run(Model& m, std::vector<Span> batch, bool all, std::vector<float>& logits, size_t rows) {
  logits.assign(rows * m.config.vocab_size, -1);
  return forward(m, batch, all, logits.data(), [] { return false; });
}

void test_forward(const std::vector<const Kernels*>& isas, const Config& c) {
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
      KvCache a(c), b(c), d(c);
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
      fill(one, Scheme::f32, 3), fill(other, Scheme::f16, 8);
      KvCache e(c), f(c), g(c), h(c);
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
      const int before = b.length();
      std::vector<Span> again = {{&b, ids.data(), 5}};
      check(!forward(m, again, false, step.data(), [] { return true; }) && b.length() == before, "an interrupted forward appends nothing", k->name);
    }
}
}  // namespace

int main() {
  const auto isas = runnable();
  test_matmul(isas);
  test_repack();
  test_amx_in_emulation();
  test_threads();
  Config c{.n_layers = 2, .vocab_size = 50, .hidden_size = 48, .ffn_size = 80, .n_heads = 4, .n_kv_heads = 2, .head_dim = 12,
           .max_context = 700, .norm_eps = 1e-5f, .activation = Activation::relu2, .attention_scale = 0.3f, .sub_norms = true};
  test_forward(isas, c);
  c.activation = Activation::gelu_tanh, c.sub_norms = false, c.post_norms = c.qk_norms = true, c.sliding_window = 70;
  c.embedding_scale = 7, c.activation_group = 32;
  test_forward(isas, c);
  std::printf("%s on %zu instruction sets: %d failures\n", failures ? "FAILED" : "passed", isas.size(), failures);
  return failures ? 1 : 0;
}
