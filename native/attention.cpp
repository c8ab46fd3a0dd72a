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

void Rotation::apply(const Kernels& k, float* x, int n_heads, bool interleaved) const {
  const int half = int(cosine.size());
  if (!interleaved) return k.rotate(x, n_heads, half, cosine.data(), sine.data());
  for (int h = 0; h < n_heads; h++, x += 2 * half)
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
}

void store_kv(const Kernels& k, const Config& c, int layer, const Token& token, const float* keys, const float* values) {
  const int dim = token.cache->padded_dim(), page = token.position / KvCache::kPagePositions, slot = token.position % KvCache::kPagePositions;
  std::vector<float> row(dim);
  std::vector<uint16_t> halves(dim);
  for (int h = 0; h < c.n_kv_heads; h++) {
    std::memcpy(row.data(), keys + h * c.head_dim, c.head_dim * sizeof(float));
    k.store_f16(row.data(), dim, halves.data());
    uint16_t* block = token.cache->keys(page, layer, h) + slot / kKeyBlock * kKeyBlock * dim + slot % kKeyBlock;
    for (int d = 0; d < dim; d++) block[d * kKeyBlock] = halves[d];
    std::memcpy(row.data(), values + h * c.head_dim, c.head_dim * sizeof(float));
    k.store_f16(row.data(), dim, token.cache->values(page, layer, h) + slot * dim);
  }
}

void attend(const Kernels& k, ThreadPool& pool, const Config& c, int layer, int window, const std::vector<Token>& tokens, const float* q,
            Buffer<float>& scratch, float* out) {
  constexpr int kPage = KvCache::kPagePositions, kTokens = 12;
  const int dim = tokens[0].cache->padded_dim(), group = c.n_heads / c.n_kv_heads, n_tokens = int(tokens.size());
  // Up to twelve tokens of one sequence that follow one another go together: each key and value is read once for all their heads.
  std::vector<int> starts;
  int longest = 0;
  for (int t = 0; t < n_tokens; t++) {
    const bool follows = t > 0 && tokens[t].cache == tokens[t - 1].cache && tokens[t].position == tokens[t - 1].position + 1;
    if (!follows || t - starts.back() == kTokens) starts.push_back(t);
    longest = std::max(longest, tokens[t].position + 1);
  }
  starts.push_back(n_tokens);
  const int blocks = int(starts.size()) - 1;
  // Too few items to share out evenly: the heads of one key/value head in two halves.
  const int halves = group % 2 == 0 && blocks * c.n_kv_heads % pool.size() && blocks * c.n_kv_heads < 8 * pool.size() ? 2 : 1;
  const int heads = group / halves, n_items = blocks * c.n_kv_heads * halves;
  const int64_t stride = (longest + 63) / 16 * 16, per_query = stride + 2 * dim;
  scratch.reserve(size_t(per_query) * kTokens * heads * pool.size());  // per thread and query: scores, query, result
  pool.run(n_items, [&](int item, int thread) {
    const int block = blocks - 1 - item / (c.n_kv_heads * halves);  // the longest first
    const int first = starts[block], n = starts[block + 1] - first, n_queries = n * heads;
    const int kv = item / halves % c.n_kv_heads, first_head = kv * group + item % halves * heads;
    KvCache& cache = *tokens[first].cache;
    float* scores = scratch.data() + size_t(per_query) * kTokens * heads * thread;
    float *queries = scores + stride * n_queries, *sums = queries + int64_t{n_queries} * dim;
    auto at = [&](int i) { return (size_t(first + i / heads) * c.n_heads + first_head + i % heads) * c.head_dim; };  // query i in q and out
    for (int i = 0; i < n_queries; i++) {
      std::memcpy(queries + i * dim, q + at(i), c.head_dim * sizeof(float));
      std::fill_n(queries + i * dim + c.head_dim, dim - c.head_dim, 0.0f);
    }
    std::fill_n(sums, int64_t{n_queries} * dim, 0.0f);
    // Positions that query i sees, [begin(i), end(i)); all queries together see [from, to), from being the start of a block.
    auto end = [&](int i) { return tokens[first + i / heads].position + 1; };
    auto begin = [&](int i) { return window ? std::max(0, end(i) - window) : 0; };
    const int from = begin(0) / kKeyBlock * kKeyBlock, to = end(n_queries - 1);
    for (int j = from, next; j < to; j = next) {
      next = std::min((j / kPage + 1) * kPage, to);
      k.scores_f16(queries, n_queries, cache.keys(j / kPage, layer, kv) + j % kPage * dim, (next - j + kKeyBlock - 1) / kKeyBlock, dim,
                   c.attention_scale, scores + j - from, stride);
    }
    for (int i = 0; i < n_queries; i++) {
      float* p = scores + i * stride + begin(i) - from;
      const int seen = end(i) - begin(i);
      const float inverse = 1.0f / k.softmax(p, seen);
      for (int j = 0; j < seen; j++) p[j] *= inverse;
    }
    // Adds the values of [low, high) to the sums of `count` queries from i on.
    auto weigh = [&](int i, int count, int low, int high) {
      for (int j = low, next; j < high; j = next) {
        next = std::min((j / kPage + 1) * kPage, high);
        k.weigh_f16(scores + i * stride + j - from, stride, count, cache.values(j / kPage, layer, kv) + j % kPage * dim, next - j, dim, sums + i * dim);
      }
    };
    // What all of them see they read together; before and after that each reads its own, so that none meets what it may not see.
    const int all_from = begin(n_queries - 1), all_to = std::max(all_from, end(0));
    for (int i = 0; i < n_queries; i++) weigh(i, 1, begin(i), std::min(all_from, end(i)));
    weigh(0, n_queries, all_from, all_to);
    for (int i = 0; i < n_queries; i++) weigh(i, 1, std::max(all_to, begin(i)), end(i));
    for (int i = 0; i < n_queries; i++) std::memcpy(out + at(i), sums + i * dim, c.head_dim * sizeof(float));
  }, int64_t{n_tokens} * longest * c.n_heads * dim >= 16384);
}

}  // namespace bitnet
