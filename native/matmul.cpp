#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "repack.h"
#include "zero_skip.h"

namespace bitnet {
namespace {

constexpr int kLongStreamTokens = 64;      // up to here reading the weights takes longer than multiplying by them
constexpr int kTokenPiece = 4;              // of tokens, that a thread quantizes at a time
constexpr int64_t kPieceBytes = 32768;     // of weights, that a thread takes at a time
constexpr int kPartInputs = 320;            // whose codes of two panels stay in L1: a multiple of 64, 32, 20, 16 and 8
constexpr int64_t kCachedBytes = 1 << 20;  // of activations, that stay in a core's L2 while panel after panel meets them

struct CodecKernels {
  MultiplyInteger multiply;
  GemmInteger gemm;
  Unpack unpack;  // null: codes are stored as gemm wants them
};
CodecKernels kernels_for(const Kernels& k, Scheme s) {
  if (s == Scheme::ternary) return {k.multiply_t2, k.gemm_ternary, k.unpack_t2};
  if (s == Scheme::ternary_base3) return {k.multiply_b3, k.gemm_ternary, k.unpack_b3};
  if (s == Scheme::binary) return {k.multiply_b1, k.gemm_ternary, k.unpack_b1};
  if (s == Scheme::int4) return {k.multiply_i4, k.gemm_i4, k.unpack_i4};
  if (s == Scheme::fp4) return {k.multiply_fp4, k.gemm_fp4, k.unpack_fp4};
  return {k.multiply_i8, k.gemm_i8, nullptr};
}

// Panels [first, end), two at a time, their codes unpacked once for all tokens; the scales are applied to the exact sums of each run.
class ManyTokens {
 public:
  ManyTokens(const Kernels& k, const Linear& w, const QuantizedRows& x, float* y)
      : k_(k), w_(w), x_(x), y_(y), f_(kernels_for(k, w.scheme)), matrix_(w.view()), last_run_(x.n_runs - 1),
        tail_(x.runs[last_run_].first % 64 == 0 ? 64 : 16) {}

  void multiply(int first, int end) {
    if (k_.begin_gemm) {
      int64_t bits = 0;  // as many of 64 divide all runs as divide this
      for (int r = 0; r < x_.n_runs; r++) bits |= inputs(r);
      k_.begin_gemm(bits, x_.n_tokens);
    }
    const bool one_run = x_.n_runs == 1 && !x_.grouped;
    if (w_.lie != Lie::panels) return lines(first, end);
    for (int panel = first; panel < end; panel += 2) {
      const int n_panels = std::min(2, end - panel);
      if (!one_run) several_runs(panel, n_panels);
      else if (x_.n_tokens <= kGemmTokens && f_.unpack) one_block(panel, n_panels);
      else one_run_many_blocks(panel, n_panels);
    }
    if (k_.end_gemm) k_.end_gemm();
  }
  static constexpr int kTogether = 4;  // panels that columns unpack at once

 private:
  // A run reads on to a multiple of 16 inputs, the last one of 64 where it can: there x is zero.
  int inputs(int r) const { return round_up(x_.runs[r].inputs, r == last_run_ ? tail_ : 16); }
  const uint8_t* panel_codes(int panel) const { return w_.panels.data() + panel * w_.panel_bytes; }
  static uint8_t* scratch(size_t bytes) {
    static thread_local Buffer<uint8_t> unpacked;
    return unpacked.reserve(bytes);
  }

  // The codes of whole panels as gemm wants them, [n_panels][*panel_bytes].
  const uint8_t* unpacked(int panel, int n_panels, int64_t* panel_bytes) const {
    *panel_bytes = w_.panel_bytes;
    if (!f_.unpack) return panel_codes(panel);
    *panel_bytes = int64_t{16} * round_up(w_.padded_cols, 64);
    uint8_t* codes = scratch(2 * *panel_bytes + 2 * kSlack);
    for (int p = 0; p < n_panels; p++) {
      uint8_t* to = codes + p * *panel_bytes;  // what a group holds beyond its inputs the next one overwrites
      for (int g = 0; g < w_.n_groups; g++, to += int64_t{16} * w_.group) {
        const int64_t at = int64_t{g} * w_.group_vectors, vectors = std::min<int64_t>(w_.group_vectors, w_.code_bytes / 64 - at);
        f_.unpack(panel_codes(panel + p) + 64 * at, vectors, 4096, to);
      }
    }
    return codes;
  }

  // All tokens in one block: codes are needed once, so they are unpacked in parts that stay in the nearest cache.
  void one_block(int panel, int n_panels) {
    const int all = inputs(0), per_vector = layout(w_.scheme).inputs();
    const int64_t part_bytes = int64_t{16} * kPartInputs + kSlack, vectors = w_.code_bytes / 64;
    uint8_t* codes = scratch(2 * part_bytes + kSlack);
    for (int at = 0; at < all; at += kPartInputs) {
      const int64_t first = at / per_vector, n = std::min<int64_t>(kPartInputs / per_vector, vectors - first);
      for (int p = 0; p < n_panels; p++) f_.unpack(panel_codes(panel + p) + 64 * first, n, 2 * w_.panel_bytes, codes + p * part_bytes);
      f_.gemm(codes, part_bytes, n_panels, std::min(kPartInputs, all - at), x_.q + at, x_.stride, x_.n_tokens, at == 0, at + kPartInputs >= all, dots_);
    }
    k_.write_run(matrix_, x_, panel, n_panels, 0, x_.n_tokens, dots_, y_);
  }

  void one_run_many_blocks(int panel, int n_panels) {
    int64_t panel_bytes;
    const uint8_t* codes = unpacked(panel, n_panels, &panel_bytes);
    many_blocks(codes, panel_bytes, panel, n_panels);
  }
  // Rows or columns, which have one run and no groups.
  void lines(int first, int end) {
    const int64_t panel_bytes = int64_t{16} * round_up(w_.padded_cols, 64);
    uint8_t* codes = scratch(kTogether * panel_bytes + 2 * kSlack);
    for (int panel = first; panel < end; panel += kTogether) {
      const int n_panels = std::min(kTogether, end - panel);
      unpack_lines(k_, w_, panel, n_panels, codes, panel_bytes);
      for (int p = 0; p < n_panels; p += 2) many_blocks(codes + p * panel_bytes, panel_bytes, panel + p, std::min(2, n_panels - p));
    }
    if (k_.end_gemm) k_.end_gemm();
  }
  void many_blocks(const uint8_t* codes, int64_t panel_bytes, int panel, int n_panels) {
    for (int t0 = 0; t0 < x_.n_tokens; t0 += kGemmTokens) {
      const int n = std::min(kGemmTokens, x_.n_tokens - t0);
      f_.gemm(codes, panel_bytes, n_panels, inputs(0), x_.q + t0 * x_.stride, x_.stride, n, true, true, dots_);
      k_.write_run(matrix_, x_, panel, n_panels, t0, n, dots_, y_);
    }
  }

  void several_runs(int panel, int n_panels) {
    int64_t panel_bytes;
    const uint8_t* codes = unpacked(panel, n_panels, &panel_bytes);
    for (int t0 = 0; t0 < x_.n_tokens; t0 += kGemmTokens) {
      const int n = std::min(kGemmTokens, x_.n_tokens - t0);
      constexpr int kStride = 2 * kGemmTokens * kPanelRows;
      alignas(64) float sums[kStride] = {};
      for (int first = 0; first < x_.n_runs; first += kGemmRuns) {
        const int n_runs = std::min(kGemmRuns, x_.n_runs - first);
        for (int r = 0; r < n_runs; r++) {
          const int64_t at = x_.runs[first + r].first;
          f_.gemm(codes + 16 * at, panel_bytes, n_panels, inputs(first + r), x_.q + t0 * x_.stride + at, x_.stride, n, true, true, dots_ + r * kStride);
        }
        for (int p = 0; p < n_panels; p++)
          k_.add_runs(matrix_, x_, first, n_runs, panel + p, t0, n, dots_ + p * kGemmTokens * kPanelRows, kStride, sums + p * kGemmTokens * kPanelRows);
      }
      for (int p = 0; p < n_panels; p++) {
        const int row0 = (panel + p) * kPanelRows, n_rows = std::min(kPanelRows, w_.rows - row0);
        for (int t = 0; t < n; t++) {
          const float step = x_.grouped ? 1.0f : x_.steps[t0 + t], *sum = sums + (p * kGemmTokens + t) * kPanelRows;
          float* to = y_ + int64_t{t0 + t} * w_.rows + row0;
          for (int r = 0; r < n_rows; r++) to[r] = sum[r] * step;
        }
      }
    }
  }

  const Kernels& k_;
  const Linear& w_;
  const QuantizedRows& x_;
  float* y_;
  const CodecKernels f_;
  const IntegerMatrix matrix_;
  const int last_run_, tail_;
  alignas(64) int32_t dots_[kGemmRuns * 2 * kGemmTokens * kPanelRows];  // of some runs, two panels and a block of tokens
};

// From how many tokens on codes are unpacked once for all of them: measured. Short runs cost more to scale than to multiply.
int many_tokens(const Kernels& k, const Linear& w, const QuantizedRows& x) {
  if (x.n_runs > 1 && x.runs[0].inputs < 64) return 33;
  const bool unpacked = w.scheme == Scheme::ternary_base3 || w.lie != Lie::panels;  // by multiply_*, if at all, for every few tokens anew
  return unpacked ? std::min(k.gemm_tokens, 9) : k.gemm_tokens;
}

void multiply_dense(const Kernels& k, const Linear& w, const float* x, int n_tokens, int first, int end, float* y) {
  const MultiplyDense multiply = w.scheme == Scheme::f16 ? k.multiply_f16 : w.scheme == Scheme::bf16 ? k.multiply_bf16 : k.multiply_f32;
  constexpr int kTokens = 24;  // a multiple of what kernels hold in registers, at most kGemmTokens
  alignas(64) float sums[2 * kGemmTokens * kPanelRows];
  for (int panel = first; panel < end; panel += 2) {
    const int n_panels = std::min(2, end - panel);
    for (int t0 = 0; t0 < n_tokens; t0 += kTokens) {
      const int n = std::min(kTokens, n_tokens - t0);
      multiply(w.panels.data() + panel * w.panel_bytes, w.panel_bytes, n_panels, w.padded_cols, x + int64_t{t0} * w.padded_cols, w.padded_cols, n, sums);
      for (int p = 0; p < n_panels; p++) {
        const int row0 = (panel + p) * kPanelRows, n_rows = std::min(kPanelRows, w.rows - row0);
        for (int t = 0; t < n; t++) std::copy_n(sums + (p * kGemmTokens + t) * kPanelRows, n_rows, y + int64_t{t0 + t} * w.rows + row0);
      }
    }
  }
}

void add_bias(const Linear& w, int panel, int n_tokens, float* y) {
  for (int t = 0; t < n_tokens; t++)
    for (int r = panel * kPanelRows; r < std::min(w.rows, (panel + 1) * kPanelRows); r++) y[int64_t{t} * w.rows + r] += w.bias[r];
}
}  // namespace

void Activations::prepare(const Linear& w) {
  if (!w.integer()) return;
  stride_ = round_up(cols_, 64) | 64;  // an odd number of cache lines, so that rows do not all fall into the same sets
  n_steps_ = (cols_ + step_inputs() - 1) / step_inputs();
  q_.reserve(size_t(round_up(n_, kGemmTokens)) * stride_ + kSlack);
  step_.reserve(size_t(n_) * n_steps_), step_sums_.reserve(size_t(n_) * n_steps_);
  group_ = 0;
}

void Activations::quantize_row(const Kernels& k, int t) {
  if (stride_ == 0) return;
  int8_t* row = q_.data() + t * stride_;
  int64_t step = int64_t{t} * n_steps_;
  for (int c = 0; c < cols_; c += step_inputs(), step++)
    step_[step] = k.quantize(x_ + int64_t{t} * cols_ + c, std::min(step_inputs(), cols_ - c), row + c, &step_sums_[step]);
  std::memset(row + cols_, 0, stride_ - cols_);
}

void Activations::quantize(const Kernels& k, ThreadPool& pool, const Linear& w) {
  if (stride_ == 0) {
    prepare(w);
    pool.run_ranges(n_, kTokenPiece, [&](int from, int to, int) {
      for (int t = from; t < to; t++) quantize_row(k, t);
    });
  }
  const int step_group = step_inputs();
  const int per_vector = layout(w.scheme).inputs();
  if (group_ == w.group && group_vectors_ == w.group_vectors && inputs_per_vector_ == per_vector) return;
  const bool same_inputs = group_ == w.group;  // only where they lie in a panel differs
  group_ = w.group, group_vectors_ = w.group_vectors, inputs_per_vector_ = per_vector;
  runs_.clear();
  for (int first = 0, next; first < cols_; first = next) {
    const int weights = first / w.group, steps = first / step_group, within = first - weights * w.group;
    next = std::min({(weights + 1) * w.group, (steps + 1) * step_group, cols_});
    if (within % per_vector) throw std::invalid_argument("a step of the activations ends within a vector of " + std::to_string(per_vector) + " weights");
    runs_.push_back({first, next - first, weights * w.group_vectors + within / per_vector, (next - first + per_vector - 1) / per_vector, weights, steps});
  }
  if (same_inputs || int(runs_.size()) == n_steps_) return;  // as many runs as steps: their sums are known
  sums_.reserve(size_t(n_) * runs_.size());
  pool.run_ranges(n_, kTokenPiece, [&](int from, int to, int) {
    for (int64_t t = from; t < to; t++)
      for (size_t r = 0; r < runs_.size(); r++) sums_[t * runs_.size() + r] = k.sum_i8(q_.data() + t * stride_ + runs_[r].first, runs_[r].inputs);
  });
}

const float* Activations::dense(int padded) {
  if (padded == cols_) return x_;
  padded_.reserve(size_t(n_) * padded);
  for (int t = 0; t < n_; t++) {
    std::memcpy(&padded_[size_t(t) * padded], x_ + int64_t{t} * cols_, cols_ * sizeof(float));
    std::fill_n(&padded_[size_t(t) * padded + cols_], padded - cols_, 0.0f);
  }
  return padded_.data();
}

void matmul(const Kernels& k, ThreadPool& pool, std::initializer_list<Product> products, Activations& x, LowRankUpdates* beside) {
  const Linear& w0 = *products.begin()->w;
  int n = 0;  // panels of all matrices, one after another
  int64_t bytes = 0;
  for (const Product& p : products) {
    if (p.w->scheme != w0.scheme || p.w->group != w0.group || p.w->lie != w0.lie || (p.w->lie != Lie::panels && products.size() > 1)) {  // they need different preparations of x
      for (const Product& each : products) matmul(k, pool, {each}, x, std::exchange(beside, nullptr));
      return;
    }
    n += p.w->n_panels(), bytes += p.w->bytes();
  }
  const int n_tokens = x.n_tokens();
  const float* dense = nullptr;
  if (w0.integer()) x.quantize(k, pool, w0);
  else dense = x.dense(w0.padded_cols);
  const bool lines = w0.lie != Lie::panels;
  const bool many = w0.integer() && n_tokens >= many_tokens(k, w0, x.rows(0, n_tokens)) && kernels_for(k, w0.scheme).gemm;
  if (lines && !many) {  // one after another: as many as the batch has
    if (beside) pool.run(beside->pieces(), [&](int i, int) { beside->multiply_a(i); });
    for (const Product& p : products) multiply_lines(k, pool, *p.w, x, nullptr, p.y);
    return;
  }
  // Few tokens: memory is the limit, and likes long streams. Many: arithmetic is, and two panels go together.
  const bool streams = n_tokens <= kLongStreamTokens;
  const int fair = n / (8 * pool.size());  // small matrices in smaller pieces, or one thread would wait for the other's
  const int piece = streams ? std::max(2, std::min(fair, int(kPieceBytes / std::max<int64_t>(1, bytes / n))) & ~1) : 2;
  const int unit = lines ? ManyTokens::kTogether : 1;  // panels that stay together
  // As many tokens at once as stay in the cache.
  const int token_bytes = w0.integer() ? round_up(x.cols(), 64) : 4 * w0.padded_cols;
  const int block = !streams ? std::max<int>(kGemmTokens, int(kCachedBytes / token_bytes) / (3 * kGemmTokens) * 3 * kGemmTokens) : n_tokens;
  for (int t0 = 0; t0 < n_tokens; t0 += block) {
    const int tokens = std::min(block, n_tokens - t0);
    const QuantizedRows rows = w0.integer() ? x.rows(t0, tokens) : QuantizedRows{};
    const int aside = beside && t0 == 0 ? beside->pieces() : 0;  // first, for they are long
    pool.run_ranges(aside + (n + unit - 1) / unit, lines ? 1 : piece, [&](int first, int end, int) {
      for (; first < std::min(end, aside); first++) beside->multiply_a(first);
      if (first == end) return;
      first = (first - aside) * unit, end = std::min(n, (end - aside) * unit);
      for (const Product& p : products) {
        const int here = std::min(end, p.w->n_panels());
        if (first < here) {
          float* y = p.y + int64_t{t0} * p.w->rows;
          if (many) ManyTokens(k, *p.w, rows, y).multiply(first, here);
          else if (p.w->integer()) kernels_for(k, p.w->scheme).multiply(p.w->view(), rows, first, here - first, y);
          else multiply_dense(k, *p.w, dense + int64_t{t0} * w0.padded_cols, tokens, first, here, y);
          if (p.w->bias.size())
            for (int panel = first; panel < here; panel++) add_bias(*p.w, panel, tokens, y);
        }
        first = std::max(0, first - p.w->n_panels()), end = end - p.w->n_panels();
        if (end <= 0) break;
      }
    }, bytes * n_tokens >= 32768);
  }
}

}  // namespace bitnet
