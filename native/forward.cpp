#include "forward.h"

#include <algorithm>
#include <chrono>

namespace bitnet {
namespace {
// Up to here a pass that skips zeros is faster than one that multiplies by all: the more tokens, the fewer lines none of them needs.
constexpr int kSkipTokens = 3;

// Adds the time that it lives to `seconds`.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_;
};
}  // namespace

bool forward(Model& model, const std::vector<Span>& batch, bool all_logits, float* logits, const std::function<bool()>& interrupted) {
  const std::lock_guard<std::mutex> alone(model.busy);  // the pool and the workspace serve one pass at a time
  const Config& c = model.config;
  const Kernels& k = *model.kernels;
  ThreadPool& pool = model.pool;

  std::vector<Token> tokens;
  std::vector<int32_t> ids;
  std::vector<int> wanted;  // rows whose logits are asked for
  std::vector<LowRankUpdates::Tokens> adapted;
  for (const Span& span : batch) {
    span.cache->reserve(span.n_tokens);
    if (span.adapter && !adapted.empty() && adapted.back().adapter == span.adapter && adapted.back().first + adapted.back().n == int(tokens.size()))
      adapted.back().n += span.n_tokens;
    else if (span.adapter) adapted.push_back({span.adapter, int(tokens.size()), span.n_tokens});
    for (int i = 0; i < span.n_tokens; i++) {
      if (all_logits || i + 1 == span.n_tokens) wanted.push_back(int(tokens.size()));
      tokens.push_back({span.cache, span.cache->length() + i});
      ids.push_back(span.tokens[i]);
    }
  }
  const int n = int(tokens.size()), width = c.hidden_size, q_width = c.n_heads * c.head_dim, kv_width = c.n_kv_heads * c.head_dim;

  Workspace& m = model.workspace;
  float *x = m.x.reserve(size_t(n) * width), *h = m.h.reserve(size_t(n) * width);
  float *q = m.q.reserve(size_t(n) * q_width), *mixed = m.mixed.reserve(size_t(n) * q_width);
  float *keys = m.keys.reserve(size_t(n) * kv_width), *values = m.values.reserve(size_t(n) * kv_width);
  float *gate = m.gate.reserve(size_t(n) * c.ffn_size), *up = m.up.reserve(size_t(n) * c.ffn_size);
  Activations& in = m.in;
  in.set_step_group(c.activation_group);

  Profile& profile = model.profile;
  const Stopwatch whole(profile.total_s);
  auto multiply = [&](std::initializer_list<Product> products) {
    if (products.begin()->w->integer()) in.quantize(k, pool, *products.begin()->w);
    const Stopwatch watch(profile.matmul_s);
    matmul(k, pool, products, in);
  };
  // A layer's products, and what adapters add to them.
  auto multiply_in_layer = [&](int l, Reader reader, std::initializer_list<Product> products) {
    if (adapted.empty()) return multiply(products);
    if (products.begin()->w->integer()) in.quantize(k, pool, *products.begin()->w);
    const Stopwatch watch(profile.matmul_s);
    m.updates.begin(k, adapted, l, reader, in.values());
    matmul(k, pool, products, in, &m.updates);
    m.updates.add_b(pool, products);
  };
  // Once per token, in pieces that are worth claiming.
  auto for_tokens = [&](auto&& work) {
    pool.run_ranges(n, 4, [&](int first, int end, int) {
      for (int t = first; t < end; t++) work(t);
    });
  };
  // Likewise: work(t) writes row t of `rows`, which `reader` multiplies next, so that it is quantized while it is in the cache.
  auto write_rows = [&](const float* rows, int cols, const Linear& reader, auto&& work) {
    in.set(rows, n, cols);
    in.prepare(reader);
    for_tokens([&](int t) {
      work(t);
      in.quantize_row(k, t);
    });
  };
  // h's rows through a norm (null: as they are) into the residual stream, and the stream through the next norm into h for its reader.
  auto add_and_norm = [&](const Buffer<float>& of_h, const Buffer<float>* next, const Linear* reader) {
    auto work = [&](int t) {
      float *row = x + int64_t{t} * width, *out = h + int64_t{t} * width;
      if (c.post_norms) k.rms_norm(out, of_h.data(), width, c.norm_eps, out);
      k.add(row, out, width);
      if (next) k.rms_norm(row, next->data(), width, c.norm_eps, out);
    };
    if (next) write_rows(h, width, *reader, work);
    else for_tokens(work);
  };
  const auto gated = c.activation == Activation::relu2 ? k.relu2_gate : c.activation == Activation::silu ? k.silu_gate : k.gelu_tanh_gate;

  // Zeros of the gate's activations, which the gate times ones shows, and of what down_proj reads.
  auto count_gates = [&](int l) {
    std::vector<float> ones(c.ffn_size, 1.0f), active(c.ffn_size);
    for (int t = 0; t < n; t++) {
      gated(gate + int64_t{t} * c.ffn_size, ones.data(), c.ffn_size, active.data());
      model.zeros[l].gates += std::count(active.begin(), active.end(), 0.0f);
    }
    model.zeros[l].values += int64_t{n} * c.ffn_size;
  };
  auto count_inputs = [&](int l) {
    const bool integer = model.layers[l].down.integer();
    for (int t = 0; t < n; t++) {
      const float* row = gate + int64_t{t} * c.ffn_size;
      const int8_t* q = integer ? in.rows(t, 1).q : nullptr;
      model.zeros[l].inputs += q ? std::count(q, q + c.ffn_size, int8_t{0}) : std::count(row, row + c.ffn_size, 0.0f);
    }
  };

  std::vector<Rotation> rotations[2];  // of full and of windowed layers
  for (const Token& t : tokens) {
    rotations[0].emplace_back(model.rope_inverse.data(), c.head_dim, t.position, c.rope_scale);
    if (model.rope_inverse_local.size()) rotations[1].emplace_back(model.rope_inverse_local.data(), c.head_dim, t.position, 1.0f);
  }
  write_rows(h, width, model.layers[0].q, [&](int t) {
    float* row = x + int64_t{t} * width;
    dequantize_row(k, model.embedding, ids[t], row);
    if (c.embedding_scale != 1)
      for (int i = 0; i < width; i++) row[i] *= c.embedding_scale;
    k.rms_norm(row, model.layers[0].attn_norm.data(), width, c.norm_eps, h + int64_t{t} * width);
  });

  for (int l = 0; l < c.n_layers; l++) {
    const Layer& layer = model.layers[l];
    // Attention
    multiply_in_layer(l, kQkv, {{&layer.q, q}, {&layer.k, keys}, {&layer.v, values}});
    if (interrupted()) return false;
    for_tokens([&](int t) {
      float *queries = q + int64_t{t} * q_width, *key = keys + int64_t{t} * kv_width;
      if (c.qk_norms) {
        for (int i = 0; i < q_width; i += c.head_dim) k.rms_norm(queries + i, layer.q_norm.data(), c.head_dim, c.norm_eps, queries + i);
        for (int i = 0; i < kv_width; i += c.head_dim) k.rms_norm(key + i, layer.k_norm.data(), c.head_dim, c.norm_eps, key + i);
      }
      const Rotation& rotation = rotations[layer.windowed][t];
      rotation.apply(k, queries, c.n_heads, c.rope_interleaved);
      rotation.apply(k, key, c.n_kv_heads, c.rope_interleaved);
      if (tokens[t].cache->centered())
        for (size_t i = 0; i < layer.key_center.size(); i++) key[i] -= layer.key_center[i];
      if (tokens[t].cache->rotated()) {
        const int block = c.head_dim & -c.head_dim;  // the largest power of two that divides a head
        k.hadamard(queries, q_width, block), k.hadamard(key, kv_width, block);
      }
    });
    store_kv(k, pool, c, l, tokens, keys, values);
    {
      const Stopwatch watch(profile.attention_s);
      attend(k, pool, c, l, layer.windowed ? c.sliding_window : 0, tokens, q, m.attention, mixed);
    }
    write_rows(mixed, q_width, layer.o, [&](int t) {
      float* row = mixed + int64_t{t} * q_width;
      if (c.sub_norms) k.rms_norm(row, layer.attn_sub_norm.data(), q_width, c.norm_eps, row);
    });
    multiply_in_layer(l, kO, {{&layer.o, h}});
    add_and_norm(layer.post_attn_norm, &layer.ffn_norm, &layer.gate);
    if (interrupted()) return false;

    // Feed-forward
    const bool skips = layer.up.lie == Lie::rows && n <= kSkipTokens && adapted.empty();
    if (skips) {
      multiply({{&layer.gate, gate}});
      if (!model.zeros.empty()) count_gates(l);
      const Stopwatch watch(profile.matmul_s);
      m.marks.set_gates(k, gate, n, c.ffn_size);
      multiply_lines(k, pool, layer.up, in, &m.marks, up, [&](int t, int first, int rows) {
        const int64_t at = int64_t{t} * c.ffn_size + first;
        gated(gate + at, up + at, rows, gate + at);
      });
      profile.up_rows += m.marks.n(), profile.up_rows_read += m.marks.read();
    } else {
      multiply_in_layer(l, kGateUp, {{&layer.gate, gate}, {&layer.up, up}});
      if (!model.zeros.empty()) count_gates(l);
    }
    if (interrupted()) return false;
    write_rows(gate, c.ffn_size, layer.down, [&](int t) {
      float* g = gate + int64_t{t} * c.ffn_size;
      if (!skips) gated(g, up + int64_t{t} * c.ffn_size, c.ffn_size, g);
      if (c.sub_norms) k.rms_norm(g, layer.ffn_sub_norm.data(), c.ffn_size, c.norm_eps, g);
    });
    if (!model.zeros.empty()) count_inputs(l);
    if (skips) {
      const Stopwatch watch(profile.matmul_s);
      const QuantizedRows rows = in.rows(0, n);
      m.marks.set_activations(k, rows.q, rows.stride, n, c.ffn_size);
      multiply_lines(k, pool, layer.down, in, &m.marks, h);
      profile.down_columns += m.marks.n(), profile.down_columns_read += m.marks.read();
    } else {
      multiply_in_layer(l, kDown, {{&layer.down, h}});
    }
    const Layer* next = l + 1 < c.n_layers ? &model.layers[l + 1] : nullptr;
    add_and_norm(layer.post_ffn_norm, next ? &next->attn_norm : nullptr, next ? &next->q : nullptr);
    if (interrupted()) return false;
  }

  const int n_wanted = int(wanted.size());
  for (int i = 0; i < n_wanted; i++)
    k.rms_norm(x + int64_t{wanted[i]} * width, model.final_norm.data(), width, c.norm_eps, h + int64_t{i} * width);
  in.set(h, n_wanted, width);
  multiply({{&model.output(), logits}});
  for (const Span& span : batch) span.cache->set_length(span.cache->length() + span.n_tokens);
  return true;
}

}  // namespace bitnet
