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

namespace {
// First tokens of the runs of up to `most` tokens of one sequence that follow one another without crossing a multiple of `block`
// positions; n_tokens at the end.
std::vector<int> runs_of(const std::vector<Token>& tokens, int most, int block) {
  std::vector<int> starts;
  for (int t = 0; t < int(tokens.size()); t++) {
    const bool follows = t > 0 && tokens[t].cache == tokens[t - 1].cache && tokens[t].position == tokens[t - 1].position + 1;
    if (!follows || t - starts.back() == most || tokens[t].position % block == 0) starts.push_back(t);
  }
  starts.push_back(int(tokens.size()));
  return starts;
}

uint16_t* as_f16(uint8_t* bytes) { return reinterpret_cast<uint16_t*>(bytes); }

// to [8][to_stride] = from [8][from_stride], transposed: three times, rows i and i + 4 give their elements by turns to rows 2i and 2i + 1.
void transpose8(const uint16_t* from, int from_stride, uint16_t* to, int to_stride) {
  typedef uint16_t Row __attribute__((vector_size(16), aligned(2), may_alias));
  Row rows[8], next[8];
  for (int i = 0; i < 8; i++) rows[i] = *reinterpret_cast<const Row*>(from + i * from_stride);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i++) rows[i] = next[i];
  }
  for (int i = 0; i < 8; i++) *reinterpret_cast<Row*>(to + i * to_stride) = rows[i];
}
}  // namespace

void store_kv(const Kernels& k, ThreadPool& pool, const Config& c, int layer, const std::vector<Token>& tokens, const float* keys,
              const float* values) {
  const int dim = tokens[0].cache->padded_dim(), kv_width = c.n_kv_heads * c.head_dim;
  const std::vector<int> starts = runs_of(tokens, kKeyBlock, kKeyBlock);
  pool.run_ranges(int(starts.size()) - 1, 1, [&](int begin, int end, int) {
    std::vector<float> row(dim);
    std::vector<uint16_t> halves(size_t(kKeyBlock) * dim);
    auto to_halves = [&](const float* from, uint16_t* to) {  // padded with zeros
      if (c.head_dim == dim) return k.store_f16(from, dim, to);
      std::memcpy(row.data(), from, c.head_dim * sizeof(float));
      k.store_f16(row.data(), dim, to);
    };
    for (int run = begin; run < end; run++) {
      const int first = starts[run], n = starts[run + 1] - first;
      KvCache& cache = *tokens[first].cache;
      const KvFormat& format = cache.format();
      const int page = tokens[first].position / KvCache::kPagePositions, slot = tokens[first].position % KvCache::kPagePositions;
      for (int h = 0; h < c.n_kv_heads; h++) {
        for (int i = 0; i < n; i++) {
          const int64_t at = int64_t{first + i} * kv_width + h * c.head_dim;
          if (format.value_bits == 16) to_halves(values + at, as_f16(cache.values(page, layer, h)) + (slot + i) * dim);
          else store_value(k, cache, page, slot + i, layer, h, values + at, c.head_dim);
          if (format.key_bits == 16) to_halves(keys + at, &halves[size_t(i) * dim]);
          else store_key(k, cache, page, slot + i, layer, h, keys + at, c.head_dim);
        }
        if (format.key_bits < 16) continue;
        uint16_t* block = as_f16(cache.keys(page, layer, h)) + slot / kKeyBlock * kKeyBlock * dim + slot % kKeyBlock;  // [dim, 16 positions]
        if (n == kKeyBlock) {
          for (int d = 0; d < dim; d += 8)
            for (int i = 0; i < n; i += 8) transpose8(&halves[size_t(i) * dim + d], dim, block + d * kKeyBlock + i, kKeyBlock);
        } else {
          for (int d = 0; d < dim; d++)
            for (int i = 0; i < n; i++) block[d * kKeyBlock + i] = halves[size_t(i) * dim + d];
        }
      }
    }
  });
}

void load_keys(const Kernels& k, const Config& c, KvCache& cache, int layer, float* out) {
  const int dim = cache.padded_dim();
  std::vector<float> block(size_t(dim) * kKeyBlock);
  for (int first = 0; first < cache.length(); first += kKeyBlock)
    for (int h = 0; h < c.n_kv_heads; h++) {
      const int page = first / KvCache::kPagePositions, n = std::min(kKeyBlock, cache.length() - first);
      k.load_f16(as_f16(cache.keys(page, layer, h)) + first % KvCache::kPagePositions * dim, dim * kKeyBlock, block.data());
      for (int i = 0; i < n; i++)
        for (int d = 0; d < c.head_dim; d++) out[(int64_t{first + i} * c.n_kv_heads + h) * c.head_dim + d] = block[d * kKeyBlock + i];
    }
}

void attend(const Kernels& k, ThreadPool& pool, const Config& c, int layer, int window, const std::vector<Token>& tokens, const float* q,
            AttentionScratch& scratch, float* out) {
  constexpr int kPage = KvCache::kPagePositions, kTokens = 12;
  const int dim = tokens[0].cache->padded_dim(), group = c.n_heads / c.n_kv_heads, n_tokens = int(tokens.size());
  // Up to twelve tokens of one sequence that follow one another go together: each key and value is read once for all their heads.
  const std::vector<int> starts = runs_of(tokens, kTokens, 1 << 30);
  int longest = 0;
  for (const Token& t : tokens) longest = std::max(longest, t.position + 1);
  const int blocks = int(starts.size()) - 1;
  // Few items that cannot be shared out evenly: those left over go in two halves of their query heads.
  const int n_whole_items = blocks * c.n_kv_heads, left = group % 2 == 0 && n_whole_items < 8 * pool.size() ? n_whole_items % pool.size() : 0;
  const int whole = n_whole_items - left, n_items = whole + 2 * left;
  const int64_t stride = (longest + 63 + 63) / 16 * 16, per_thread = ((stride + 2 * dim + 1) * kTokens * group + 15) / 16 * 16;
  scratch.floats.reserve(size_t(per_thread) * pool.size());  // per thread and query: scores, query, result, total
  scratch.quantized.resize(pool.size());
  pool.run(n_items, [&](int item, int thread) {
    const bool half = item >= whole;
    const int which = half ? whole + (item - whole) / 2 : item, heads = half ? group / 2 : group;
    const int block = blocks - 1 - which / c.n_kv_heads;  // the longest first
    const int first = starts[block], n = starts[block + 1] - first, n_queries = n * heads;
    const int kv = which % c.n_kv_heads, first_head = kv * group + (half ? (item - whole) % 2 * heads : 0);
    KvCache& cache = *tokens[first].cache;
    const KvFormat& format = cache.format();
    QuantizedAttention& quantized = scratch.quantized[thread];
    float* scores = scratch.floats.data() + per_thread * thread;
    float *queries = scores + stride * n_queries, *sums = queries + int64_t{n_queries} * dim, *totals = sums + int64_t{n_queries} * dim;
    auto at = [&](int i) { return (size_t(first + i / heads) * c.n_heads + first_head + i % heads) * c.head_dim; };  // query i in q and out
    for (int i = 0; i < n_queries; i++) {
      std::memcpy(queries + i * dim, q + at(i), c.head_dim * sizeof(float));
      std::fill_n(queries + i * dim + c.head_dim, dim - c.head_dim, 0.0f);
    }
    std::fill_n(sums, int64_t{n_queries} * dim, 0.0f);
    // Positions that query i sees, [begin(i), end(i)); all queries together see [from, to), from being the start of a block, or of a run.
    auto end = [&](int i) { return tokens[first + i / heads].position + 1; };
    auto begin = [&](int i) { return window ? std::max(0, end(i) - window) : 0; };
    constexpr int kRun = QuantizedAttention::kRun;
    const int from = format.value_bits == 16 ? begin(0) / kKeyBlock * kKeyBlock : begin(0) / kRun * kRun, to = end(n_queries - 1);
    if (format.key_bits < 16) quantized.set_queries(k, cache, queries, n_queries, c.attention_scale);
    for (int j = from, next; j < to; j = next) {
      next = std::min((j / kPage + 1) * kPage, to);
      const int n_blocks = (next - j + kKeyBlock - 1) / kKeyBlock;
      if (format.key_bits < 16) quantized.scores(k, cache, j / kPage, layer, kv, j % kPage / kKeyBlock, n_blocks, scores + j - from, stride);
      else k.scores_f16(queries, n_queries, as_f16(cache.keys(j / kPage, layer, kv)) + j % kPage * dim, n_blocks, dim, c.attention_scale, scores + j - from, stride);
    }
    for (int i = 0; i < n_queries; i++) totals[i] = k.softmax(scores + i * stride + begin(i) - from, end(i) - begin(i));
    if (format.value_bits < 16) {  // in integers, a weight of zero hides what a query may not see
      for (int i = 0; i < n_queries; i++) {
        float* weights = scores + i * stride - from;
        std::fill(weights + from, weights + begin(i), 0.0f), std::fill(weights + end(i), weights + from + round_up(to - from, kKeyBlock), 0.0f);
      }
      for (int j = from, next; j < to; j = next) {
        next = std::min((j / kPage + 1) * kPage, to);
        quantized.weigh(k, cache, j / kPage, layer, kv, j % kPage, next - j, scores + j - from, stride, n_queries, sums);
      }
    } else {
      // Adds the values of [low, high) to the sums of `count` queries from i on.
      auto weigh = [&](int i, int count, int low, int high) {
        for (int j = low, next; j < high; j = next) {
          next = std::min((j / kPage + 1) * kPage, high);
          k.weigh_f16(scores + i * stride + j - from, stride, count, as_f16(cache.values(j / kPage, layer, kv)) + j % kPage * dim, next - j, dim, sums + i * dim);
        }
      };
      // What all of them see they read together; before and after that each reads its own, so that none meets what it may not see.
      const int all_from = begin(n_queries - 1), all_to = std::max(all_from, end(0));
      for (int i = 0; i < n_queries; i++) weigh(i, 1, begin(i), std::min(all_from, end(i)));
      weigh(0, n_queries, all_from, all_to);
      for (int i = 0; i < n_queries; i++) weigh(i, 1, std::max(all_to, begin(i)), end(i));
    }
    for (int i = 0; i < n_queries; i++) {
      const float inverse = 1.0f / totals[i];
      for (int d = 0; d < c.head_dim; d++) out[at(i) + d] = sums[i * dim + d] * inverse;
    }
  }, int64_t{n_tokens} * longest * c.n_heads * dim >= 16384);
}

}  // namespace bitnet
