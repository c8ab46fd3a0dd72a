// The product of a weight matrix with a batch of activation rows.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "linear.h"
#include "low_rank.h"
#include "threads.h"

namespace bitnet {

// A batch of rows, quantized when the first integer matrix asks and then kept for the next one.
class Activations {
 public:
  // step_group: inputs that share a step; 0: all of a token's.
  explicit Activations(int step_group = 0) : step_group_(step_group) {}
  void set_step_group(int inputs) { step_group_ = inputs, stride_ = 0; }
  void set(const float* x, int n_tokens, int cols) { x_ = x, n_ = n_tokens, cols_ = cols, stride_ = 0, group_ = 0; }
  int n_tokens() const { return n_; }
  int cols() const { return cols_; }
  const float* values() const { return x_; }  // [n_tokens, cols]
  // For w to read: all rows, unless whoever wrote them did it row by row, between prepare and here, from any thread.
  void quantize(const Kernels& k, ThreadPool& pool, const Linear& w);
  void prepare(const Linear& w);
  void quantize_row(const Kernels& k, int t);
  const float* dense(int padded);  // rows of `padded` floats

  // As the matrix that last asked needs them, of tokens [first, first + n).
  QuantizedRows rows(int first, int n) const {
    const int n_runs = int(runs_.size());
    return {q_.data() + first * stride_, stride_, runs_.data(), n_runs, (n_runs == n_steps_ ? step_sums_ : sums_).data() + int64_t{first} * n_runs,
            step_.data() + int64_t{first} * n_steps_, n_steps_, step_group_ > 0, n};
  }

 private:
  int step_inputs() const { return step_group_ ? step_group_ : cols_; }

  const float* x_ = nullptr;
  int n_ = 0, cols_ = 0, step_group_ = 0, n_steps_ = 1;
  int group_ = 0;  // of the weights that runs_ are for, with their group_vectors_
  int group_vectors_ = 0, inputs_per_vector_ = 0;
  int64_t stride_ = 0;
  Buffer<int8_t> q_;           // [n, stride], zero-padded
  Buffer<float> step_, padded_;
  Buffer<int32_t> step_sums_, sums_;  // [n, n_steps], [n, runs]: sums of q
  std::vector<Run> runs_;
};

// y [n_tokens, w.rows] = x w^T, equal to ternary.py's matmul_integer or matmul_dense.
struct Product {
  const Linear* w;
  float* y;
};
// Products of the same x, shared out together: between two matrices nobody waits. beside: whose A meets the same x and is done with them.
void matmul(const Kernels& k, ThreadPool& pool, std::initializer_list<Product> products, Activations& x, LowRankUpdates* beside = nullptr);
inline void matmul(const Kernels& k, ThreadPool& pool, const Linear& w, Activations& x, float* y) { matmul(k, pool, {{&w, y}}, x); }

}  // namespace bitnet
