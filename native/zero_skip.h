// Zero skipping: rows of up_proj and columns of down_proj that meet a zero are never read, and the result is the same to the bit.
//
// relu(gate)^2 is zero wherever the gate is not positive. What it is multiplied by, a row of up_proj, then counts nothing, and neither does
// the column of down_proj that meets it; nor does one whose activation is rounded to an int8 of zero. So up_proj lies in rows and down_proj
// in columns (kernels.h), each a stream of its own whose successor is fetched while it is added. Sums are exact integers: their order does not
// matter. A pass of many tokens multiplies by the same bytes, unpacked (matmul.cpp). Related: Deja Vu (arXiv:2310.17157), which predicts what
// is zero; here it is known.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "matmul.h"

namespace bitnet {

// Which lines of a matrix each token of a batch needs, a bit each.
class Marks {
 public:
  // relu(gate)^2 of gate [n_tokens, n] that is not zero.
  void set_gates(const Kernels& k, const float* gate, int n_tokens, int n);
  // q that is not zero; rows are `stride` apart.
  void set_activations(const Kernels& k, const int8_t* q, int64_t stride, int n_tokens, int n);
  const uint64_t* of(int token) const { return bits_.data() + int64_t{token} * words_; }
  int64_t any() const { return any_; }  // lines that some token needs
  int n() const { return n_; }          // lines
  // Lines that multiply_lines reads: where most are needed it reads all of them, as one stream, which is faster.
  int64_t read() const { return any_ > kStreamShare * n_ ? n_ : any_; }
  static constexpr double kStreamShare = 0.7;

 private:
  template <typename Mark>
  void set(int n_tokens, int n, const Mark& mark);
  std::vector<uint64_t> bits_;  // [n_tokens, words]
  int words_ = 0, n_ = 0;
  int64_t any_ = 0;
};

// y [n_tokens, w.rows] = x w^T for w in lines. marks: which rows of w to compute, or which columns to add; of the others y is 0, or x is.
// Null: all of them. done(token, first, n): rows [first, first + n) of w are in y; called by the thread that wrote them, so that what follows need
// not wait for the others.
using RowsDone = std::function<void(int token, int first, int n)>;
void multiply_lines(const Kernels& k, ThreadPool& pool, const Linear& w, Activations& x, const Marks* marks, float* y, const RowsDone& done = {});

}  // namespace bitnet
