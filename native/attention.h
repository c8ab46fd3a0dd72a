// Rotary position embedding, and causal attention of a batch of queries over their sequences' caches.
#pragma once
#include <vector>

#include "config.h"
#include "kernels/kernels.h"
#include "quantized_kv.h"
#include "threads.h"

namespace bitnet {

// A token of the ragged batch: which sequence it belongs to, and where in it.
struct Token {
  KvCache* cache;
  int position;
};

// Rotates x [n_heads, head_dim] in place by position * inverse[i] radians, and scales it.
struct Rotation {
  std::vector<float> cosine, sine;  // [head_dim / 2], times scale
  Rotation(const float* inverse, int head_dim, int position, float scale);
  void apply(const Kernels& k, float* x, int n_heads, bool interleaved) const;
};

// Writes keys, values [n_tokens, n_kv_heads * head_dim] into the tokens' caches at their positions.
void store_kv(const Kernels& k, ThreadPool& pool, const Config& c, int layer, const std::vector<Token>& tokens, const float* keys,
              const float* values);

// The keys that a cache with f16 keys holds of one layer, after rope: out [length, n_kv_heads * head_dim].
void load_keys(const Kernels& k, const Config& c, KvCache& cache, int layer, float* out);

struct AttentionScratch {
  Buffer<float> floats;
  std::vector<QuantizedAttention> quantized;  // of each thread
};

// q, out [n_tokens, n_heads * head_dim]. Every token sees its cache up to its own position, in the order of positions; with a
// window of more than 0, only that many positions, its own included. scratch: memory to work in.
void attend(const Kernels& k, ThreadPool& pool, const Config& c, int layer, int window, const std::vector<Token>& tokens, const float* q,
            AttentionScratch& scratch, float* out);

}  // namespace bitnet
