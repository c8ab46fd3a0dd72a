#include "low_rank.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "matmul.h"

namespace bitnet {
namespace {

constexpr int kRowsPiece = 8;       // of A, that a thread takes at a time
constexpr int64_t kSharedB = 65536;  // weights of B times tokens, from which on it is worth waking another thread

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
// Puts code [r, c] at place(r, c, whether they are narrow) of `size` places; the others are 0.
template <class Place>
void lay_out(const int16_t* codes, int rows, int cols, int64_t size, Arena* arena, Codes& to, Place&& place) {
  const bool narrow = std::all_of(codes, codes + int64_t{rows} * cols, [](int16_t code) { return code == int8_t(code); });
  auto fill = [&](auto& buffer) {
    buffer = std::remove_reference_t<decltype(buffer)>(size, arena);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < cols; c++) buffer[place(r, c, narrow)] = codes[int64_t{r} * cols + c];
  };
  narrow ? fill(to.narrow) : fill(to.wide);
}
void check(bool ok, const char* problem) {
  if (!ok) throw std::invalid_argument(problem);
}
}  // namespace

int64_t LowRank::bytes() const {
  int64_t sum = a.bytes() + 4 * int64_t(scales.size());
  for (const Part& p : parts) sum += p.b.bytes();
  return sum;
}

int64_t Adapter::bytes() const {
  int64_t sum = 0;
  for (const auto& layer : layers_)
    for (const LowRank& w : layer) sum += w.bytes();
  return sum;
}

void Adapter::set_a(int layer, const std::string& part, const int16_t* codes, int ranks, int cols, const float* scales) {
  const Place place = place_of(config_, part);
  check(layer >= 0 && layer < config_.n_layers, "no such layer");
  check(cols == place.cols && ranks > 0 && ranks % 4 == 0 && ranks <= 65536, "A's rows come in fours, as wide as what they read");
  LowRank& w = layers_[layer][place.reader];
  check(w.ranks == 0, "A was set before");
  w.ranks = ranks, w.cols = cols, w.row_inputs = round_up(cols, 64);
  lay_out(codes, ranks, cols, ranks * w.row_inputs, &arena_, w.a, [&](int r, int c, bool narrow) {
    const int step = narrow ? 64 : 32;
    return r * w.row_inputs + c / step * step + c % 16 * (step / 16) + c % step / 16;
  });
  w.scales = Buffer<float>(ranks, &arena_);
  for (int r = 0; r < ranks; r++) w.scales[r] = std::ldexp(scales[r], w.a.is_narrow() ? -24 : -16);
}

void Adapter::set_b(int layer, const std::string& part, const int16_t* codes, int rows, int rank, int first) {
  const Place place = place_of(config_, part);
  check(layer >= 0 && layer < config_.n_layers, "no such layer");
  LowRank& w = layers_[layer][place.reader];
  check(rows == place.rows, "B has another number of rows than the matrix");
  check(rank > 0 && first >= 0 && first % 4 == 0 && rank <= w.ranks - first, "B's columns meet rows that A does not have");
  LowRank::Part& p = w.parts[place.part];
  p.rows = rows, p.rank = round_up(rank, 4), p.first = first;
  lay_out(codes, rows, rank, int64_t{round_up(rows, kPanelRows)} * p.rank, &arena_, p.b, [&](int r, int k, bool narrow) {
    const int64_t four = int64_t{r / kPanelRows * kPanelRows} * p.rank + k / 4 * 4 * kPanelRows;
    return four + (narrow ? r % kPanelRows * 4 + k % 4 : k % 2 * 2 * kPanelRows + r % kPanelRows * 2 + k % 4 / 2);
  });
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
  auto dot = [&](auto kernel, const auto& a) {
    kernel(&a[p.row * w.row_inputs], p.n_rows, w.row_inputs, w.cols, x_ + int64_t{p.first} * w.cols, w.cols, p.n, to, w.ranks);
  };
  w.a.is_narrow() ? dot(k_->dot_i8, w.a.narrow) : dot(k_->dot_i16, w.a.wide);
  for (int t = 0; t < p.n; t++)
    for (int r = 0; r < p.n_rows; r++) to[int64_t{t} * w.ranks + r] *= w.scales[p.row + r];
}

void LowRankUpdates::add_b(ThreadPool& pool, std::initializer_list<Product> products) {
  if (updates_.empty()) return;
  int n = 0;  // panels of all matrices, one after another
  int64_t work = 0;
  for (const Product& p : products) n += p.w->n_panels();
  for (const Update& u : updates_)
    for (const LowRank::Part& part : u.w->parts) work += int64_t{part.rows} * part.rank * u.n;
  pool.run_ranges(n, std::max(4, n / (8 * pool.size())), [&](int first, int end, int) {
    int part = 0;
    for (const Product& p : products) {
      for (const Update& u : updates_) {
        const LowRank::Part& of = u.w->parts[part];
        const int row = first * kPanelRows, n_rows = std::min(end * kPanelRows, of.rows) - row;
        if (n_rows <= 0) continue;
        auto add = [&](auto kernel, const auto& b) {
          kernel(&b[size_t(row) * of.rank], n_rows, of.rank, &inner_[u.inner + of.first], u.w->ranks, u.n, p.y + int64_t{u.first} * of.rows + row, of.rows);
        };
        of.b.is_narrow() ? add(k_->add_i8, of.b.narrow) : add(k_->add_i16, of.b.wide);
      }
      first = std::max(0, first - p.w->n_panels()), end -= p.w->n_panels(), part++;
      if (end <= 0) break;
    }
  }, work >= kSharedB);
}

}  // namespace bitnet
