// The weights of one model and what runs them. Filled by name, then checked once, before the first forward.
#pragma once
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "config.h"
#include "matmul.h"
#include "zero_skip.h"

namespace bitnet {

struct Layer {
  Linear q, k, v, o, gate, up, down;
  Buffer<float> attn_norm, ffn_norm;          // [hidden_size]
  Buffer<float> attn_sub_norm, ffn_sub_norm;  // [n_heads * head_dim], [ffn_size]; empty without sub_norms
  Buffer<float> post_attn_norm, post_ffn_norm;  // [hidden_size]; empty without post_norms
  Buffer<float> q_norm, k_norm;               // [head_dim]; empty without qk_norms
  Buffer<float> key_center;                   // [n_kv_heads * head_dim], taken off quantized keys after rope; may be empty
  bool windowed = false;                      // sees config.sliding_window positions, and rotates by rope_inverse_local
};

// What a forward pass works in; kept, because the system clears fresh memory.
struct Workspace {
  Buffer<float> x, h;           // [n, hidden_size]: residual stream; its norm, or a layer's output
  Buffer<float> q, mixed;       // [n, n_heads * head_dim]: queries; attention's result
  Buffer<float> keys, values;   // [n, n_kv_heads * head_dim]
  Buffer<float> gate, up;       // [n, ffn_size]
  AttentionScratch attention;
  Activations in;
  LowRankUpdates updates;
  Marks marks;                  // what zero skipping reads
};

// Where the time of all forward passes went, in seconds.
struct Profile {
  double matmul_s = 0, attention_s = 0, total_s = 0;
  // Lines of up_proj and down_proj that the passes which skip would have read without it, and those that they read.
  int64_t up_rows = 0, up_rows_read = 0, down_columns = 0, down_columns_read = 0;
};

// How much of a layer's feed-forward is zero, over the tokens of all passes while it is counted.
struct Zeros {
  int64_t gates = 0;   // activations of the gate that are exactly zero
  int64_t inputs = 0;  // of down_proj that are, as it reads them: rounded to int8 where it has integer weights
  int64_t values = 0;  // of how many each
};

struct Model {
  // windowed [n_layers]: which layers see only config.sliding_window positions.
  Model(const Config& config, const std::vector<bool>& windowed, int n_threads, const Kernels* kernels);

  Config config;
  const Kernels* kernels;
  ThreadPool pool;
  Arena arena;           // the matrices' memory
  Linear embedding;      // [vocab_size, hidden_size]; also the head if `head` is empty
  Linear head;
  Buffer<float> final_norm;   // [hidden_size]
  Buffer<float> rope_inverse, rope_inverse_local;  // [head_dim / 2], radians per position; of full and of windowed layers
  std::vector<Layer> layers;
  Workspace workspace;
  Profile profile;
  std::vector<Zeros> zeros;  // [n_layers] while they are counted, else empty
  std::mutex busy;

  // Names: embedding, head, and layers.N.{q,k,v,o,gate,up,down}; for vectors final_norm, rope_inverse, rope_inverse_local,
  // layers.N.{attn,ffn,attn_sub,ffn_sub,post_attn,post_ffn,q,k}_norm, and layers.N.{q,k,v,o,gate,up,down}_bias and
  // layers.N.key_center, which may stay unset. A wrong name or shape throws std::invalid_argument.
  void set_linear(const std::string& name, Linear w);
  void set_vector(const std::string& name, const float* values, int n);
  // Whether all feed-forwards can skip zeros: relu^2, ternary with one scale a row, one step per token.
  bool can_skip_zeros() const;
  // How else the matrix of this name may come to lie, if the model should skip zeros.
  Lie may_lie(const std::string& name) const {
    if (config.activation != Activation::relu2) return Lie::panels;
    return name.ends_with(".up") ? Lie::rows : name.ends_with(".down") ? Lie::columns : Lie::panels;
  }
  // Lays up_proj and down_proj so that passes of few tokens skip zeros, or back. Throws std::invalid_argument.
  void skip_zeros(bool on);
  int64_t skippable_bytes() const;  // of up_proj and down_proj
  bool skips_zeros() const { return layers[0].up.lie == Lie::rows; }
  void check_complete() const;  // throws std::invalid_argument that names what is missing

  const Linear& output() const { return head.rows ? head : embedding; }
  int64_t weight_bytes() const;            // all weights
  int64_t weight_bytes_per_token() const;  // read to decode one token: every layer, the norms and the head

 private:
  struct LinearSlot { Linear* to; int rows, cols; };
  struct VectorSlot { Buffer<float>* to; int n; bool optional = false; };
  std::map<std::string, LinearSlot> linears_;
  std::map<std::string, VectorSlot> vectors_;
};

}  // namespace bitnet
