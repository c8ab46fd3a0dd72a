// The product of a weight matrix with a batch of activation rows.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace bitnet {

// A run of inputs over which both the weights' scale and the activations' step are constant.
struct Run {
  int first, inputs;  // inputs: a multiple of 16, or up to the padded end
  int weight_group, step_group;
};

// A batch of rows, quantized when the first integer matrix asks and then kept for the next one.
class Activations {
 public:
  explicit Activations(int step_group = 0) : step_group_(step_group) {}  // inputs that share a step; 0: all of a token's
  void set(const float* x, int n_tokens, int cols) { x_ = x, n_ = n_tokens, cols_ = cols, stride_ = 0, padded_cols_ = 0; }
  int n_tokens() const { return n_; }
  int cols() const { return cols_; }
  void quantize(const Kernels& k, ThreadPool& pool, const Linear& w);
  const float* dense(int padded);  // rows of `padded` floats

  const int8_t* q() const { return q_.data(); }           // [n, stride]
  int64_t stride() const { return stride_; }              // a multiple of 64, zero-padded
  bool grouped() const { return step_group_ > 0; }
  int n_steps() const { return n_steps_; }                // per token
  const float* step() const { return step_.data(); }      // [n, n_steps]
  const std::vector<Run>& runs() const { return runs_; }  // of the matrix that last asked
  const int32_t* run_sums() const { return sums_.data(); }  // [n, runs], sums of q

 private:
  const float* x_ = nullptr;
  int n_ = 0, cols_ = 0, step_group_ = 0, n_steps_ = 1, weight_group_ = 0, padded_cols_ = 0;
  int64_t stride_ = 0;
  Buffer<int8_t> q_;
  Buffer<float> step_, padded_;
  Buffer<int32_t> sums_;
  std::vector<Run> runs_;
};

// y [n_tokens, w.rows] = x w^T, equal to ternary.py's matmul_integer or matmul_dense.
struct Product {
  const Linear* w;
  float* y;
};
// Products of the same x, shared out together: between two matrices nobody waits.
void matmul(const Kernels& k, ThreadPool& pool, std::initializer_list<Product> products, Activations& x);
inline void matmul(const Kernels& k, ThreadPool& pool, const Linear& w, Activations& x, float* y) { matmul(k, pool, {{&w, y}}, x); }

}  // namespace bitnet
