#include "forward.h"

#include <cstring>

namespace bitnet {

bool forward(Model& model, const std::vector<Span>& batch, bool all_logits, float* logits, const std::function<bool()>& interrupted) {
  const Config& c = model.config;
  const Kernels& k = *model.kernels;
  ThreadPool& pool = model.pool;

  std::vector<Token> tokens;
  std::vector<int32_t> ids;
  std::vector<int> wanted;  // rows whose logits are asked for
  for (const Span& span : batch) {
    span.cache->reserve(span.cache->length() + span.n_tokens);
    for (int i = 0; i < span.n_tokens; i++) {
      if (all_logits || i + 1 == span.n_tokens) wanted.push_back(int(tokens.size()));
      tokens.push_back({span.cache, span.cache->length() + i});
      ids.push_back(span.tokens[i]);
    }
  }
  const int n = int(tokens.size()), width = c.hidden_size, q_width = c.n_heads * c.head_dim, kv_width = c.n_kv_heads * c.head_dim;

  Buffer<float> x(size_t(n) * width), h(size_t(n) * width);              // residual stream; its norm, or a layer's output
  Buffer<float> q(size_t(n) * q_width), mixed(size_t(n) * q_width);      // queries; attention's result
  Buffer<float> keys(size_t(n) * kv_width), values(size_t(n) * kv_width);
  Buffer<float> gate(size_t(n) * c.ffn_size), up(size_t(n) * c.ffn_size);
  Activations in(c.activation_group);

  auto norm_rows = [&](const float* from, const Buffer<float>& weight, int cols, float* to) {
    pool.run(n, [&](int t, int) { k.rms_norm(from + int64_t{t} * cols, weight.data(), cols, c.norm_eps, to + int64_t{t} * cols); });
  };
  auto add_to_stream = [&] { k.add(x.data(), h.data(), n * width); };

  std::vector<Rotation> rotations[2];  // of full and of windowed layers
  for (const Token& t : tokens) {
    rotations[0].emplace_back(model.rope_inverse.data(), c.head_dim, t.position, c.rope_scale);
    if (model.rope_inverse_local.size()) rotations[1].emplace_back(model.rope_inverse_local.data(), c.head_dim, t.position, 1.0f);
  }
  pool.run(n, [&](int t, int) {
    float* row = &x[size_t(t) * width];
    dequantize_row(k, model.embedding, ids[t], row);
    if (c.embedding_scale != 1)
      for (int i = 0; i < width; i++) row[i] *= c.embedding_scale;
  });

  for (int l = 0; l < c.n_layers; l++) {
    const Layer& layer = model.layers[l];
    // Attention
    norm_rows(x.data(), layer.attn_norm, width, h.data());
    in.set(h.data(), n, width);
    matmul(k, pool, {{&layer.q, q.data()}, {&layer.k, keys.data()}, {&layer.v, values.data()}}, in);
    if (interrupted()) return false;
    pool.run(n, [&](int t, int) {
      if (c.qk_norms) {
        for (float *head = &q[size_t(t) * q_width], *end = head + q_width; head < end; head += c.head_dim)
          k.rms_norm(head, layer.q_norm.data(), c.head_dim, c.norm_eps, head);
        for (float *head = &keys[size_t(t) * kv_width], *end = head + kv_width; head < end; head += c.head_dim)
          k.rms_norm(head, layer.k_norm.data(), c.head_dim, c.norm_eps, head);
      }
      const Rotation& rotation = rotations[layer.windowed][t];
      rotation.apply(&q[size_t(t) * q_width], c.n_heads, c.rope_interleaved);
      rotation.apply(&keys[size_t(t) * kv_width], c.n_kv_heads, c.rope_interleaved);
      store_kv(k, c, l, tokens[t], &keys[size_t(t) * kv_width], &values[size_t(t) * kv_width]);
    });
    attend(k, pool, c, l, layer.windowed ? c.sliding_window : 0, tokens, q.data(), mixed.data());
    if (c.sub_norms) norm_rows(mixed.data(), layer.attn_sub_norm, q_width, mixed.data());
    in.set(mixed.data(), n, q_width);
    matmul(k, pool, layer.o, in, h.data());
    if (c.post_norms) norm_rows(h.data(), layer.post_attn_norm, width, h.data());
    add_to_stream();
    if (interrupted()) return false;

    // Feed-forward
    norm_rows(x.data(), layer.ffn_norm, width, h.data());
    in.set(h.data(), n, width);
    matmul(k, pool, {{&layer.gate, gate.data()}, {&layer.up, up.data()}}, in);
    if (interrupted()) return false;
    const auto gated = c.activation == Activation::relu2 ? k.relu2_gate : c.activation == Activation::silu ? k.silu_gate : k.gelu_tanh_gate;
    pool.run(n, [&](int t, int) {
      float* g = &gate[size_t(t) * c.ffn_size];
      gated(g, &up[size_t(t) * c.ffn_size], c.ffn_size, g);
    });
    if (c.sub_norms) norm_rows(gate.data(), layer.ffn_sub_norm, c.ffn_size, gate.data());
    in.set(gate.data(), n, c.ffn_size);
    matmul(k, pool, layer.down, in, h.data());
    if (c.post_norms) norm_rows(h.data(), layer.post_ffn_norm, width, h.data());
    add_to_stream();
    if (interrupted()) return false;
  }

  const int n_wanted = int(wanted.size());
  for (int i = 0; i < n_wanted; i++)
    k.rms_norm(&x[size_t(wanted[i]) * width], model.final_norm.data(), width, c.norm_eps, &h[size_t(i) * width]);
  in.set(h.data(), n_wanted, width);
  matmul(k, pool, model.output(), in, logits);
  for (const Span& span : batch) span.cache->set_length(span.cache->length() + span.n_tokens);
  return true;
}

}  // namespace bitnet
