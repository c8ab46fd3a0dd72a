#include "low_rank.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "matmul.h"

namespace bitnet {
namespace {

constexpr int kRowsPiece = 8;       // of A, that a thread takes at a time
constexpr int64_t kSharedB = 16384;  // weights of B times tokens, from which on it is worth waking another thread

struct Place {
  Reader reader;
  int part, rows, cols;
};
Place place_of(const Config& c, const std::string& part) {
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  if (part == "q") return {kQkv, 0, q, c.hidden_size};
  if (part == "k") return {kQkv, 1, kv, c.hidden_size};
  if (part == "v") return {kQkv, 2, kv, c.hidden_size};
  if (part == "o") return {kO, 0, c.hidden_size, q};
  if (part == "gate") return {kGateUp, 0, c.ffn_size, c.hidden_size};
  if (part == "up") return {kGateUp, 1, c.ffn_size, c.hidden_size};
  if (part == "down") return {kDown, 0, c.hidden_size, c.ffn_size};
  throw std::invalid_argument("no matrix of a layer is called " + part);
}
void check(bool ok, const char* problem) {
  if (!ok) throw std::invalid_argument(problem);
}
}  // namespace

int64_t LowRank::bytes() const {
  int64_t sum = 2 * int64_t(a.size()) + 4 * int64_t(scales.size());
  for (const Part& p : parts) sum += p.b.bytes();
  return sum;
}

int64_t Adapter::bytes() const {
  int64_t sum = 0;
  for (const auto& layer : layers_)
    for (const LowRank& w : layer) sum += w.bytes();
  return sum;
}

void Adapter::set_a(int layer, const std::string& part, const uint16_t* values, int ranks, int cols, const float* scales) {
  const Place place = place_of(config_, part);
  check(layer >= 0 && layer < config_.n_layers, "no such layer");
  check(cols == place.cols && ranks > 0 && ranks % 4 == 0 && ranks <= 65536, "A's rows come in fours, as wide as what they read");
  LowRank& w = layers_[layer][place.reader];
  check(w.ranks == 0, "A was set before");
  w.ranks = ranks, w.cols = cols, w.row_inputs = round_up(cols, 16);
  w.a = Buffer<uint16_t>(ranks * w.row_inputs, &arena_);
  for (int r = 0; r < ranks; r++) std::copy_n(values + int64_t{r} * cols, cols, &w.a[r * w.row_inputs]);
  w.scales = Buffer<float>(ranks, &arena_);
  std::copy_n(scales, ranks, w.scales.data());
}

void Adapter::set_b(int layer, const std::string& part, const uint16_t* values, int rows, int rank, int first) {
  const Place place = place_of(config_, part);
  check(layer >= 0 && layer < config_.n_layers, "no such layer");
  LowRank& w = layers_[layer][place.reader];
  check(rows == place.rows, "B has another number of rows than the matrix");
  check(rank > 0 && first >= 0 && first % 4 == 0 && rank <= w.ranks - first, "B's columns meet rows that A does not have");
  w.parts[place.part] = {repack_dense(Scheme::f16, values, rows, rank, &arena_), first};
}

void LowRankUpdates::begin(const Kernels& k, const std::vector<Tokens>& tokens, int layer, Reader reader, const float* x) {
  k_ = &k, x_ = x;
  updates_.clear(), pieces_.clear();
  int64_t inner = 0;
  for (const Tokens& t : tokens) {
    const LowRank& w = t.adapter->at(layer, reader);
    if (w.ranks == 0) continue;
    updates_.push_back({&w, t.first, t.n, inner});
    for (int first = 0; first < t.n; first += kGemmTokens)
      for (int row = 0; row < w.ranks; row += kRowsPiece)
        pieces_.push_back({&w, row, std::min(kRowsPiece, w.ranks - row), t.first + first, std::min(kGemmTokens, t.n - first), inner + int64_t{first} * w.ranks});
    inner += int64_t{t.n} * w.ranks;
  }
  inner_.reserve(inner);
}

void LowRankUpdates::multiply_a(int piece) {
  const Piece& p = pieces_[piece];
  const LowRank& w = *p.w;
  float* to = &inner_[p.inner + p.row];
  k_->rows_f16(&w.a[p.row * w.row_inputs], p.n_rows, w.row_inputs, w.cols, x_ + int64_t{p.first} * w.cols, w.cols, p.n, to, w.ranks);
  for (int t = 0; t < p.n; t++)
    for (int r = 0; r < p.n_rows; r++) to[int64_t{t} * w.ranks + r] *= w.scales[p.row + r];
}

void LowRankUpdates::add_b(ThreadPool& pool, std::initializer_list<Product> products) {
  if (updates_.empty()) return;
  int n = 0;  // panels of all matrices, one after another
  int64_t work = 0;
  for (const Product& p : products) n += p.w->n_panels();
  for (const Update& u : updates_)
    for (const LowRank::Part& part : u.w->parts) work += int64_t{part.b.rows} * part.b.cols * u.n;
  pool.run_ranges(n, std::max(4, n / (8 * pool.size())), [&](int first, int end, int) {
    int part = 0;
    for (const Product& p : products) {
      for (const Update& u : updates_) {
        const Linear& b = u.w->parts[part].b;
        const int row = first * kPanelRows, n_rows = std::min(end * kPanelRows, b.rows) - row;
        if (n_rows <= 0) continue;
        k_->add_f16(b.panels.data() + first * b.panel_bytes, b.panel_bytes, n_rows, b.padded_cols, &inner_[u.inner + u.w->parts[part].first],
                    u.w->ranks, u.n, p.y + int64_t{u.first} * b.rows + row, b.rows);
      }
      first = std::max(0, first - p.w->n_panels()), end -= p.w->n_panels(), part++;
      if (end <= 0) break;
    }
  }, work >= kSharedB);
}

}  // namespace bitnet
