// The compute graph of a decoder-only transformer: exists once, driven by config.h.
#pragma once
#include <functional>
#include <vector>

#include "attention.h"
#include "model.h"

namespace bitnet {

// One sequence's share of a ragged batch: the next n_tokens of `cache`.
struct Span {
  KvCache* cache;
  const int32_t* tokens;  // [n_tokens], each in [0, vocab_size)
  int n_tokens;           // 1 or more; cache->length() + n_tokens <= max_context
  const Adapter* adapter = nullptr;  // beside this sequence's products; made for the model's sizes
};

// Appends every span's tokens to its cache and writes logits [rows, vocab_size]: one row per span (its last token), or one per
// token if all_logits. `interrupted` is asked between operations; if it returns true, the caches keep their old length and
// false is returned. A sequence may appear in one span only.
bool forward(Model& model, const std::vector<Span>& batch, bool all_logits, float* logits, const std::function<bool()>& interrupted);

}  // namespace bitnet
