// Keys and values in 8 and 4 bits: how they are written, and how attention reads their codes (kv.py defines the numbers).
#pragma once
#include "kv_cache.h"

namespace bitnet {

// A key or value of one head [head_dim] into its slot (0..255) of a page: symmetric, a scale in f16 for each group.
void store_key(const Kernels& k, KvCache& cache, int page, int slot, int layer, int head, const float* x, int head_dim);
void store_value(const Kernels& k, KvCache& cache, int page, int slot, int layer, int head, const float* x, int head_dim);

// Some queries of one sequence, which share their keys and values, while they meet the codes. Kept per thread for its memory.
class QuantizedAttention {
 public:
  static constexpr int kRun = 64;  // positions whose weights share a step

  // queries [n, padded_dim], which are rotated if the keys are: int8 with a step each.
  void set_queries(const Kernels& k, const KvCache& cache, const float* queries, int n, float attention_scale);
  // out [n, stride]: the queries by n_blocks of 16 keys, from block `first` of a page on. stride >= 16 n_blocks.
  void scores(const Kernels& k, KvCache& cache, int page, int layer, int head, int first, int n_blocks, float* out, int64_t stride);
  // out [n, padded_dim] += weights [n, stride] by the values of positions [first, first + n_positions) of a page, first being a multiple of
  // kRun; weights are zero for what a query does not see and up to the next multiple of 16.
  void weigh(const Kernels& k, KvCache& cache, int page, int layer, int head, int first, int n_positions, const float* weights, int64_t stride, int n,
             float* out);

 private:
  Buffer<int8_t> q_, parts_;       // [n, padded_dim]; [n, 2, kPagePositions]: weights = high + low
  Buffer<int32_t> sums_;           // of q_'s groups, or of the runs of parts_
  Buffer<float> steps_, weighed_;  // [n]; [n, 2, group]
  Buffer<float> run_steps_;        // [n, 2, runs]
  Buffer<int32_t> run_sums_;
  std::vector<Run> runs_;
  int n_ = 0;
};

}  // namespace bitnet
