// Keys and values of one sequence, in pages of positions that are added as the sequence grows and never move.
//
// Sequences share pages: a page is copied when one of several owners would write to it. Quantized keys and values lie as weights do
// (kernels.h): a block of 16 positions is a panel whose rows are positions and whose inputs are the head's dimensions, and values, turned
// round, are panels of 16 dimensions whose inputs are the positions of a page. So the kernels of int4 and int8 weights read both.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "config.h"
#include "linear.h"

namespace bitnet {

// How keys and values are kept (kv.py defines the numbers).
struct KvFormat {
  int key_bits = 16, value_bits = 16;  // 16 (f16), 8 or 4
  int group = 0;        // values of a head that share an f16 scale: divides head_dim and is a multiple of 16; 0: the whole head
  bool rotate = true;   // quantized keys, and their queries, by a Hadamard transform
  bool center = true;   // quantized keys, before that, less their layer's key_center
  bool operator==(const KvFormat&) const = default;
};

class KvCache {
 public:
  static constexpr int kPagePositions = 256;
  using Page = Buffer<uint8_t>;

  explicit KvCache(const Config& c, const KvFormat& format = {})
      : format_(format), n_kv_heads_(c.n_kv_heads), padded_dim_(round_up(c.head_dim, 16)), n_groups_(format.group ? c.head_dim / format.group : 1) {
    for (int bits : {format.key_bits, format.value_bits})
      if (bits != 16 && bits != 8 && bits != 4) throw std::invalid_argument("keys and values have 16, 8 or 4 bits");
    if (format.group < 0 || format.group % 16 || (format.group && c.head_dim % format.group))
      throw std::invalid_argument("a group of the cache must divide the head and be a multiple of 16");
    if (quantized() && padded_dim_ > kMostHeadDim) throw std::invalid_argument("heads of a quantized cache have at most 1024 values");
    key_bytes_ = bytes_of(format.key_bits), head_bytes_ = key_bytes_ + bytes_of(format.value_bits);
    page_bytes_ = size_t(c.n_layers) * n_kv_heads_ * head_bytes_;
  }
  KvCache(const KvCache&) = delete;

  const KvFormat& format() const { return format_; }
  bool quantized() const { return format_.key_bits < 16 || format_.value_bits < 16; }
  bool rotated() const { return format_.key_bits < 16 && format_.rotate; }
  bool centered() const { return format_.key_bits < 16 && format_.center; }
  int length() const { return length_; }
  int padded_dim() const { return padded_dim_; }  // head_dim, zero-padded to a multiple of 16
  int n_groups() const { return n_groups_; }      // of a head
  int group() const { return padded_dim_ / n_groups_; }
  size_t page_bytes() const { return page_bytes_; }
  size_t bytes_per_token() const { return page_bytes_ / kPagePositions; }
  // Room for `n` more positions, in pages that belong to this sequence alone.
  void reserve(int n) {
    for (size_t i = length_ / kPagePositions; i < pages_.size(); i++)
      if (pages_[i].use_count() > 1) {
        auto own = std::make_shared<Page>(page_bytes_);
        std::memcpy(own->data(), pages_[i]->data(), page_bytes_);
        pages_[i] = std::move(own);
      }
    while (int(pages_.size()) * kPagePositions < length_ + n) pages_.push_back(std::make_shared<Page>(page_bytes_));
  }
  void set_length(int n) { length_ = n; }
  void truncate(int n) {
    length_ = n;
    pages_.resize((n + kPagePositions - 1) / kPagePositions);
  }
  // The first n positions of what another sequence of the same model and format holds.
  const std::vector<std::shared_ptr<Page>>& pages() const { return pages_; }
  void share(std::vector<std::shared_ptr<Page>> pages, int n) {
    pages_ = std::move(pages);
    truncate(n);
  }

  // Of one page, layer and head. f16: keys [kPagePositions / 16, padded_dim, 16], values [kPagePositions, padded_dim].
  // Codes: keys [kPagePositions / 16] panels, values [padded_dim / 16] panels. Scales: [kPagePositions / 16, n_groups, 16]; [n_groups, kPagePositions].
  uint8_t* keys(int page, int layer, int head) { return pages_[page]->data() + (size_t(layer) * n_kv_heads_ + head) * head_bytes_; }
  uint8_t* values(int page, int layer, int head) { return keys(page, layer, head) + key_bytes_; }
  uint16_t* key_scales(int page, int layer, int head) { return scales(keys(page, layer, head), format_.key_bits); }
  uint16_t* value_scales(int page, int layer, int head) { return scales(values(page, layer, head), format_.value_bits); }

 private:
  size_t code_bytes(int bits) const { return size_t(kPagePositions) * padded_dim_ * bits / 8; }
  size_t bytes_of(int bits) const { return code_bytes(bits) + (bits < 16 ? size_t(kPagePositions) * n_groups_ * sizeof(uint16_t) : 0); }
  uint16_t* scales(uint8_t* codes, int bits) { return reinterpret_cast<uint16_t*>(codes + code_bytes(bits)); }

  KvFormat format_;
  int n_kv_heads_, padded_dim_, n_groups_, length_ = 0;
  size_t key_bytes_, head_bytes_, page_bytes_;
  std::vector<std::shared_ptr<Page>> pages_;
};

}  // namespace bitnet
