// Keys and values of one sequence, f16, in pages of positions that are added as the sequence grows and never move.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "config.h"

namespace bitnet {

class KvCache {
 public:
  static constexpr int kPagePositions = 256;

  explicit KvCache(const Config& c)
      : n_kv_heads_(c.n_kv_heads),
        padded_dim_((c.head_dim + 15) / 16 * 16),
        page_size_(size_t(c.n_layers) * 2 * c.n_kv_heads * kPagePositions * padded_dim_) {}
  KvCache(const KvCache&) = delete;

  int length() const { return length_; }
  int padded_dim() const { return padded_dim_; }  // head_dim, zero-padded to a multiple of 16
  void reserve(int positions) {
    while (int(pages_.size()) * kPagePositions < positions) pages_.emplace_back(page_size_);
  }
  void set_length(int n) { length_ = n; }
  void truncate(int n) {
    length_ = n;
    pages_.resize((n + kPagePositions - 1) / kPagePositions);
  }

  // One page of one layer and head: keys [kPagePositions / 16, padded_dim, 16], values [kPagePositions, padded_dim].
  uint16_t* keys(int page, int layer, int head) { return at(page, layer, 0, head); }
  uint16_t* values(int page, int layer, int head) { return at(page, layer, 1, head); }

 private:
  uint16_t* at(int page, int layer, int which, int head) {
    return pages_[page].data() + (size_t(layer * 2 + which) * n_kv_heads_ + head) * kPagePositions * padded_dim_;
  }
  int n_kv_heads_, padded_dim_, length_ = 0;
  size_t page_size_;
  std::vector<Buffer<uint16_t>> pages_;
};

}  // namespace bitnet
