#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bitnet {

Rotation::Rotation(const float* inverse, int head_dim, int position, float scale) : cosine(head_dim / 2), sine(head_dim / 2) {
  for (int i = 0; i < head_dim / 2; i++) {
    const double angle = float(position) * inverse[i];  // the product in float32, as models are trained
    cosine[i] = float(std::cos(angle)) * scale, sine[i] = float(std::sin(angle)) * scale;
  }
}

void Rotation::apply(float* x, int n_heads, bool interleaved) const {
  const int half = int(cosine.size()), step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
  for (int h = 0; h < n_heads; h++, x += 2 * half)
    for (int i = 0; i < half; i++) {
      float& a = x[i * step];
      float& b = x[i * step + partner];
      const float a0 = a, b0 = b;
      a = a0 * cosine[i] - b0 * sine[i];
      b = b0 * cosine[i] + a0 * sine[i];
    }
}

void store_kv(const Kernels& k, const Config& c, int layer, const Token& token, const float* keys, const float* values) {
  const int dim = token.cache->padded_dim(), page = token.position / KvCache::kPagePositions, slot = token.position % KvCache::kPagePositions;
  std::vector<float> row(dim);
  for (int h = 0; h < c.n_kv_heads; h++) {
    std::memcpy(row.data(), keys + h * c.head_dim, c.head_dim * sizeof(float));
    k.store_f16(row.data(), dim, token.cache->keys(page, layer, h) + slot * dim);
    std::memcpy(row.data(), values + h * c.head_dim, c.head_dim * sizeof(float));
    k.store_f16(row.data(), dim, token.cache->values(page, layer, h) + slot * dim);
  }
}

void attend(const Kernels& k, ThreadPool& pool, const Config& c, int layer, int window, const std::vector<Token>& tokens, const float* q,
            float* out) {
  const int dim = tokens[0].cache->padded_dim(), group = c.n_heads / c.n_kv_heads, n_tokens = int(tokens.size());
  int longest = 0;
  for (const Token& t : tokens) longest = std::max(longest, t.position + 1);
  const size_t stride = (longest + 31) / 16 * 16 + 2 * dim;
  Buffer<float> scratch(stride * pool.size());  // per thread: scores, padded query, padded result
  pool.run(n_tokens * c.n_heads, [&](int item, int thread) {
    const Token& token = tokens[item / c.n_heads];
    const int head = item % c.n_heads, end = token.position + 1, begin = window ? std::max(0, end - window) : 0;
    const size_t at = (size_t(item / c.n_heads) * c.n_heads + head) * c.head_dim;
    float* query = scratch.data() + thread * stride;
    float* sum = query + dim;
    float* scores = sum + dim;
    std::memcpy(query, q + at, c.head_dim * sizeof(float));
    std::fill_n(sum, dim, 0.0f);
    // Calls work(page, slot, position, n) for every run of visible positions that lie in one page, from `slot` of it on.
    auto for_each_page = [&](auto work) {
      for (int j = begin, n; j < end; j += n) {
        const int slot = j % KvCache::kPagePositions;
        n = std::min(end - j, KvCache::kPagePositions - slot);
        work(j / KvCache::kPagePositions, slot, j, n);
      }
    };
    for_each_page([&](int page, int slot, int j, int n) {
      k.scores_f16(query, token.cache->keys(page, layer, head / group) + slot * dim, n, dim, c.attention_scale, scores + j - begin);
    });
    const float inverse = 1.0f / k.softmax(scores, end - begin);
    for_each_page([&](int page, int slot, int j, int n) {
      k.weigh_f16(scores + j - begin, token.cache->values(page, layer, head / group) + slot * dim, n, dim, sum);
    });
    for (int d = 0; d < c.head_dim; d++) out[at + d] = sum[d] * inverse;
  }, int64_t{n_tokens} * longest * c.n_heads * dim >= 16384);
}

}  // namespace bitnet
