#include "zero_skip.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace bitnet {
namespace {
constexpr int kFetchedBytes = 8192;     // of lines that are fetched while others are used
constexpr int kPieceBytes = 24576;      // of lines that a thread takes at a time, about
constexpr int kMostAhead = 128;         // lines: 8192 bytes of the shortest

// The numbers of a token's lines within words [first, end) of its marks, and then of up to `more` that follow.
int list_lines(const uint64_t* bits, int first, int end, int words, int n_lines, int more, int32_t* out) {
  int n = 0, known = 0;
  auto take = [&](int word) {
    uint64_t left = bits ? bits[word] : ~uint64_t{0} >> (word + 1 == words && n_lines % 64 ? 64 - n_lines % 64 : 0);
    for (; left; left &= left - 1) out[known++] = 64 * word + std::countr_zero(left);
  };
  for (int word = first; word < end; word++) take(word);
  n = known;
  for (int word = end; word < words && known < n + more; word++) take(word);
  if (known == 0) out[known++] = 0;
  for (const int32_t last = out[known - 1]; known < n + more;) out[known++] = last;
  return n;
}

// Sums of one thread.
struct Partial {
  std::vector<int32_t> sums;  // [n_tokens, rows in a column]
  bool used = false;
};

void add_sums(int32_t* __restrict to, const int32_t* __restrict from, int n) {
  for (int i = 0; i < n; i++) to[i] += from[i];
}
// y = float(sums - correction) * scales * step, as every kernel has it. scales: 16 for every 16 rows, `panel_scales` apart.
void scale_sums(const int32_t* __restrict sums, int32_t correction, const float* __restrict scales, int64_t panel_scales, float step, int n, float* __restrict y) {
  auto panel = [&](int row0, int rows) __attribute__((always_inline)) {
    const float* s = scales + row0 / kPanelRows * panel_scales;
    for (int r = 0; r < rows; r++) y[row0 + r] = float(sums[row0 + r] - correction) * s[r] * step;
  };
  int row0 = 0;
  for (; row0 + kPanelRows <= n; row0 += kPanelRows) panel(row0, kPanelRows);
  if (row0 < n) panel(row0, n - row0);
}
}  // namespace

template <typename Mark>
void Marks::set(int n_tokens, int n, const Mark& mark) {
  n_ = n, words_ = (n + 63) / 64, any_ = 0;
  bits_.resize(size_t(n_tokens) * words_);
  for (int t = 0; t < n_tokens; t++) mark(t, &bits_[size_t(t) * words_]);
  for (int w = 0; w < words_; w++) {
    uint64_t bits = 0;
    for (int t = 0; t < n_tokens; t++) bits |= bits_[size_t(t) * words_ + w];
    any_ += std::popcount(bits);
  }
}
void Marks::set_gates(const Kernels& k, const float* gate, int n_tokens, int n) {
  set(n_tokens, n, [&](int t, uint64_t* bits) { k.mark_gates(gate + int64_t{t} * n, n, bits); });
}
void Marks::set_activations(const Kernels& k, const int8_t* q, int64_t stride, int n_tokens, int n) {
  set(n_tokens, n, [&](int t, uint64_t* bits) { k.mark_codes(q + t * stride, n, bits); });
}

void multiply_lines(const Kernels& k, ThreadPool& pool, const Linear& w, Activations& x, const Marks* marks, float* y, const RowsDone& done) {
  x.quantize(k, pool, w);
  const int n_tokens = x.n_tokens(), n_lines = w.n_lines(), words = (n_lines + 63) / 64;
  const QuantizedRows rows = x.rows(0, n_tokens);
  const IntegerMatrix m = w.view();
  const bool base3 = w.scheme == Scheme::ternary_base3, by_rows = w.lie == Lie::rows;
  const int64_t line_bytes = w.line_bytes(), column_rows = line_bytes * layout(w.scheme).tiles;
  if (marks && marks->read() == n_lines) marks = nullptr;
  const double share = marks ? double(marks->any()) / n_lines : 1;
  const int ahead = std::clamp(int(kFetchedBytes / line_bytes), 1, kMostAhead);
  const int piece = std::clamp(int(kPieceBytes / (line_bytes * 64 * std::max(share, 0.05))), 1, 64);
  const bool worth_sharing = share * n_lines * line_bytes * n_tokens >= 32768;

  // Kept by threads: [pieces of lines], and for columns the sums
  static thread_local std::vector<Partial> partials;
  if (!by_rows) {
    partials.resize(pool.size());
    for (Partial& p : partials) p.used = false;
  }
  std::vector<Partial>& sums = partials;  // the caller's, not each thread's own
  pool.run_ranges(words, piece, [&](int first, int end, int thread) {
    static thread_local std::vector<int32_t> list, dots;
    static thread_local std::vector<float> values;
    values.resize(size_t(end - first) * 64), list.resize(size_t(end - first + 2) * 64 + 2 * kMostAhead + 64), dots.resize(size_t(end - first) * 64);
    if (!by_rows && !sums[thread].used) sums[thread].sums.assign(size_t(n_tokens) * column_rows, 0), sums[thread].used = true;
    for (int t = 0; t < n_tokens; t++) {
      const int n = list_lines(marks ? marks->of(t) : nullptr, first, end, words, n_lines, ahead + 4, list.data());
      const int8_t* q = rows.q + t * rows.stride;
      if (!by_rows) {
        (base3 ? k.add_lines_b3 : k.add_lines_t2)(w.panels.data(), line_bytes, list.data(), n, ahead, q, &sums[thread].sums[size_t(t) * column_rows]);
        continue;
      }
      (base3 ? k.dot_lines_b3 : k.dot_lines_t2)(w.panels.data(), line_bytes, list.data(), n, ahead, q, dots.data());
      const int32_t correction = m.bias * rows.run_sums[t];
      const float step = rows.steps[t];
      float* to = y + int64_t{t} * w.rows;
      const int first_row = 64 * first, n_rows = std::min(64 * end, w.rows) - first_row;
      if (marks) std::memset(to + first_row, 0, n_rows * sizeof(float));
      if (m.panel_scales == 0) {  // one for all rows
        const float scale = m.scales[0];
        for (int i = 0; i < n; i++) values[i] = float(dots[i] - correction) * scale * step;
      } else {
        for (int i = 0; i < n; i++) values[i] = float(dots[i] - correction) * m.scales[list[i]] * step;
      }
      for (int i = 0; i < n; i++) to[list[i]] = values[i];
      if (w.bias.size())
        for (int i = 0; i < n; i++) to[list[i]] += w.bias[list[i]];
      if (done) done(t, first_row, n_rows);
    }
  }, worth_sharing);
  if (by_rows) return;
  for (int t = 0; t < n_tokens; t++) {
    int32_t* total = nullptr;
    for (Partial& p : sums)
      if (p.used) {
        int32_t* part = &p.sums[size_t(t) * column_rows];
        if (total) add_sums(total, part, w.rows);
        else total = part;
      }
    float* to = y + int64_t{t} * w.rows;
    scale_sums(total, m.bias * rows.run_sums[t], m.scales, m.panel_scales, rows.steps[t], w.rows, to);
    if (w.bias.size())
      for (int r = 0; r < w.rows; r++) to[r] += w.bias[r];
  }
}

}  // namespace bitnet
