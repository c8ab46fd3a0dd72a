#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace bitnet {

void Activations::quantize(const Kernels& k, ThreadPool& pool, const Linear& w) {
  const int step_group = grouped() ? step_group_ : cols_;
  if (stride_ == 0) {
    stride_ = round_up(cols_, 64);
    n_steps_ = (cols_ + step_group - 1) / step_group;
    q_.reserve(size_t(n_) * stride_);
    step_.reserve(size_t(n_) * n_steps_);
    pool.run(n_, [&](int t, int) {
      int8_t* row = q_.data() + t * stride_;
      for (int s = 0, c = 0; c < cols_; s++, c += step_group)
        step_[size_t(t) * n_steps_ + s] = k.quantize(x_ + int64_t{t} * cols_ + c, std::min(step_group, cols_ - c), row + c);
      std::memset(row + cols_, 0, stride_ - cols_);
    });
  }
  if (weight_group_ != w.group || padded_cols_ != w.padded_cols) {
    weight_group_ = w.group, padded_cols_ = w.padded_cols;
    runs_.clear();
    for (int first = 0, next; first < cols_; first = next) {
      const int weights = first / w.group, steps = first / step_group;
      next = std::min((weights + 1) * w.group, grouped() ? (steps + 1) * step_group : w.padded_cols);
      runs_.push_back({first, std::min(next, w.padded_cols) - first, weights, steps});
    }
    sums_.reserve(size_t(n_) * runs_.size());
    pool.run(n_, [&](int t, int) {
      const int8_t* row = q_.data() + t * stride_;
      for (size_t r = 0; r < runs_.size(); r++) {
        int32_t sum = 0;
        for (int c = runs_[r].first, end = std::min(cols_, c + runs_[r].inputs); c < end; c++) sum += row[c];
        sums_[t * runs_.size() + r] = sum;
      }
    }, n_ >= 8);
  }
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

namespace {

constexpr int kTokenBlock = kGemmTokens;  // tokens whose sums of one panel are held before they are scaled

// One or two panels of 16 rows for all tokens; the scales are applied to the exact sums of each run, in order.
class IntegerPanels {
 public:
  IntegerPanels(const Kernels& k, const Linear& w, const Activations& x)
      : k_(k), w_(w), x_(x), runs_(x.runs()), bias_(code_bias(w.scheme)), many_(many(k, x)) {}

  // Whether there are enough tokens to unpack codes for.
  static bool many(const Kernels& k, const Activations& x) { return k.gemm_u8_i8 && x.n_tokens() >= 8; }

  void multiply(int panel, int n_panels, float* y) const {
    if (!many_) {
      for (int p = panel; p < panel + n_panels; p++) few_tokens(p, y);
      return;
    }
    // Unpacked codes, of which the last run may read beyond the panel: there the activations are zero.
    static thread_local Buffer<uint8_t> unpacked;
    const uint8_t* codes = w_.panels.data() + panel * w_.panel_bytes;
    int64_t panel_bytes = w_.panel_bytes;
    if (w_.scheme == Scheme::ternary) {
      panel_bytes = 16 * int64_t{round_up(w_.padded_cols, 64)};
      unpacked.reserve(2 * panel_bytes);
      for (int p = 0; p < n_panels; p++)
        k_.unpack_t2(codes + p * w_.panel_bytes, w_.padded_cols / kTwoBitInputs, unpacked.data() + p * panel_bytes);
      codes = unpacked.data();
    }
    alignas(64) int32_t dots[2 * kGemmTokens * kPanelRows];
    alignas(64) float sums[2 * kGemmTokens * kPanelRows];
    for (int t0 = 0; t0 < x_.n_tokens(); t0 += kGemmTokens) {
      const int n = std::min(kGemmTokens, x_.n_tokens() - t0);
      std::fill_n(sums, 2 * kGemmTokens * kPanelRows, 0.0f);
      for (size_t i = 0; i < runs_.size(); i++) {
        const int inputs = round_up(runs_[i].inputs, i + 1 == runs_.size() && runs_[i].first % 64 == 0 ? 64 : 16);
        k_.gemm_u8_i8(codes + 16 * int64_t{runs_[i].first}, panel_bytes, n_panels, inputs, x_.q() + t0 * x_.stride() + runs_[i].first,
                      x_.stride(), n, dots);
        for (int p = 0; p < n_panels; p++)
          add_run(panel + p, t0, n, i, dots + p * kGemmTokens * kPanelRows, sums + p * kGemmTokens * kPanelRows);
      }
      for (int p = 0; p < n_panels; p++) write(panel + p, t0, n, sums + p * kGemmTokens * kPanelRows, y);
    }
  }

 private:
  void few_tokens(int panel, float* y) const {
    const uint8_t* codes = w_.panels.data() + panel * w_.panel_bytes;
    const DotInteger dot = w_.scheme == Scheme::ternary ? k_.dot_t2_i8 : k_.dot_i8_i8;
    const int per_vector = inputs_per_vector(w_.scheme);
    alignas(64) int32_t dots[kGemmTokens * kPanelRows];
    alignas(64) float sums[kGemmTokens * kPanelRows];
    for (int t0 = 0; t0 < x_.n_tokens(); t0 += kGemmTokens) {
      const int n = std::min(kGemmTokens, x_.n_tokens() - t0);
      std::fill_n(sums, n * kPanelRows, 0.0f);
      for (size_t i = 0; i < runs_.size(); i++) {
        const Run& run = runs_[i];
        dot(codes + int64_t{64} * (run.first / per_vector), run.inputs / per_vector, x_.q() + t0 * x_.stride() + run.first, x_.stride(), n, dots);
        add_run(panel, t0, n, i, dots, sums);
      }
      write(panel, t0, n, sums, y);
    }
  }

  void add_run(int panel, int t0, int n, size_t i, const int32_t* dots, float* sums) const {
    const float* scale = &w_.scales[(size_t(panel) * w_.n_groups + runs_[i].weight_group) * kPanelRows];
    const float* steps = x_.grouped() ? x_.step() + int64_t{t0} * x_.n_steps() + runs_[i].step_group : nullptr;
    k_.scale_sums(dots, x_.run_sums() + int64_t{t0} * runs_.size() + i, runs_.size(), bias_, scale, steps, x_.n_steps(), n, sums);
  }

  void write(int panel, int t0, int n, const float* sums, float* y) const {
    const int row0 = panel * kPanelRows, n_rows = std::min(kPanelRows, w_.rows - row0);
    for (int t = 0; t < n; t++) {
      const float step = x_.grouped() ? 1.0f : x_.step()[t0 + t];
      for (int r = 0; r < n_rows; r++) y[int64_t{t0 + t} * w_.rows + row0 + r] = sums[t * kPanelRows + r] * step;
    }
  }

  const Kernels& k_;
  const Linear& w_;
  const Activations& x_;
  const std::vector<Run>& runs_;
  int bias_;
  bool many_;
};

void dense_panel(const Kernels& k, const Linear& w, const float* x, int n_tokens, int panel, float* y) {
  const DotDense dot = w.scheme == Scheme::f16 ? k.dot_f16_f32 : w.scheme == Scheme::bf16 ? k.dot_bf16_f32 : k.dot_f32_f32;
  const int row0 = panel * kPanelRows, n_rows = std::min(kPanelRows, w.rows - row0);
  alignas(64) float sums[kTokenBlock * kPanelRows];
  for (int t0 = 0; t0 < n_tokens; t0 += kTokenBlock) {
    const int n = std::min(kTokenBlock, n_tokens - t0);
    dot(w.panels.data() + panel * w.panel_bytes, w.padded_cols, x + int64_t{t0} * w.padded_cols, w.padded_cols, n, sums);
    for (int t = 0; t < n; t++) std::copy_n(sums + t * kPanelRows, n_rows, y + int64_t{t0 + t} * w.rows + row0);
  }
}

void add_bias(const Linear& w, int panel, int n_tokens, float* y) {
  for (int t = 0; t < n_tokens; t++)
    for (int r = panel * kPanelRows; r < std::min(w.rows, (panel + 1) * kPanelRows); r++) y[int64_t{t} * w.rows + r] += w.bias[r];
}
}  // namespace

void matmul(const Kernels& k, ThreadPool& pool, std::initializer_list<Product> products, Activations& x) {
  const Linear& w0 = *products.begin()->w;
  int n = 0;  // panels of all matrices, one after another
  int64_t bytes = 0;
  for (const Product& p : products) {
    if (p.w->scheme != w0.scheme || p.w->group != w0.group) {  // they need different preparations of x
      for (const Product& each : products) matmul(k, pool, {each}, x);
      return;
    }
    n += p.w->n_panels(), bytes += p.w->bytes();
  }
  const float* dense = nullptr;
  if (w0.integer()) x.quantize(k, pool, w0);
  else dense = x.dense(w0.padded_cols);
  const bool many = w0.integer() && IntegerPanels::many(k, x);
  // Few tokens: memory is the limit, and likes long streams. Each thread takes one, three quarters of its share; the last
  // quarter goes in small jobs to whoever comes first. Many tokens: arithmetic is the limit, and two panels are a job.
  const int threads = pool.size();
  const int large = many ? 0 : n * 3 / (4 * threads), small = many ? 2 : std::max(1, (n - threads * large) / (4 * threads));
  const int n_large = large ? threads : 0, n_small = (n - n_large * large + small - 1) / small;
  pool.run(n_large + n_small, [&](int job, int) {
    int first = job < n_large ? job * large : n_large * large + (job - n_large) * small;
    int end = std::min(n, first + (job < n_large ? large : small));
    for (const Product& p : products) {
      const int here = std::min(end, p.w->n_panels());
      if (first < here) {
        if (p.w->integer()) IntegerPanels(k, *p.w, x).multiply(first, here - first, p.y);
        else
          for (int panel = first; panel < here; panel++) dense_panel(k, *p.w, dense, x.n_tokens(), panel, p.y);
        if (p.w->bias.size())
          for (int panel = first; panel < here; panel++) add_bias(*p.w, panel, x.n_tokens(), p.y);
      }
      first = std::max(0, first - p.w->n_panels()), end = end - p.w->n_panels();
      if (end <= 0) break;
    }
  }, bytes * x.n_tokens() >= 32768);
}

}  // namespace bitnet
