// The weights of one model and what runs them. Filled by name, then checked once, before the first forward.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "config.h"
#include "matmul.h"

namespace bitnet {

struct Layer {
  Linear q, k, v, o, gate, up, down;
  Buffer<float> attn_norm, ffn_norm;          // [hidden_size]
  Buffer<float> attn_sub_norm, ffn_sub_norm;  // [n_heads * head_dim], [ffn_size]; empty without sub_norms
};

struct Model {
  Model(const Config& config, int n_threads, const Kernels* kernels);

  Config config;
  const Kernels* kernels;
  ThreadPool pool;
  Linear embedding;      // [vocab_size, hidden_size]; also the head if `head` is empty
  Linear head;
  Buffer<float> final_norm;   // [hidden_size]
  Buffer<float> rope_inverse;  // [head_dim / 2], radians per position
  std::vector<Layer> layers;

  // Names: embedding, head, and layers.N.{q,k,v,o,gate,up,down}; for vectors final_norm, rope_inverse and
  // layers.N.{attn,ffn,attn_sub,ffn_sub}_norm. A wrong name or shape throws std::invalid_argument.
  void set_linear(const std::string& name, Linear w);
  void set_vector(const std::string& name, const float* values, int n);
  void check_complete() const;  // throws std::invalid_argument that names what is missing

  const Linear& output() const { return head.rows ? head : embedding; }
  int64_t weight_bytes_per_token() const;  // read to decode one token: every layer, the norms and the head

 private:
  struct LinearSlot { Linear* to; int rows, cols; };
  struct VectorSlot { Buffer<float>* to; int n; };
  std::map<std::string, LinearSlot> linears_;
  std::map<std::string, VectorSlot> vectors_;
};

}  // namespace bitnet
