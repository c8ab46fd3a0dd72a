// What a decoder-only transformer is, as far as the one forward pass needs to know.
#pragma once

namespace bitnet {

enum class Activation { silu, relu2 };  // of the gate: x * sigmoid(x), or max(x, 0)^2

struct Config {
  int n_layers = 0;
  int vocab_size = 0;   // rows of the embedding and of the head
  int hidden_size = 0;  // width of the residual stream
  int ffn_size = 0;     // rows of gate_proj and up_proj
  int n_heads = 0;      // query heads
  int n_kv_heads = 0;   // key/value heads (divides n_heads)
  int head_dim = 0;     // per head; even
  int max_context = 0;  // tokens a sequence may hold
  float norm_eps = 0;   // added to the mean square in every RMSNorm
  Activation activation = Activation::silu;
  bool sub_norms = false;         // RMSNorm before o_proj and before down_proj (BitNet b1.58)
  bool rope_interleaved = false;  // rotate neighbours (2i, 2i+1) instead of halves (i, i + head_dim/2)
};

}  // namespace bitnet
