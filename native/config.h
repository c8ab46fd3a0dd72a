// What a decoder-only transformer is, as far as the one forward pass needs to know.
#pragma once

namespace bitnet {

// Of the gate: x * sigmoid(x); max(x, 0)^2; or x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
enum class Activation { silu, relu2, gelu_tanh };

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
  float embedding_scale = 1;      // multiplies the embedding's rows (gemma: sqrt(hidden_size))
  float attention_scale = 0;      // multiplies query . key, usually 1 / sqrt(head_dim)
  float rope_scale = 1;           // multiplies sine and cosine (yarn's attention factor)
  int sliding_window = 0;         // positions, its own included, that a token of a windowed layer sees
  int activation_group = 0;       // inputs that share an int8 step: a multiple of 16, or 0 for one step per token
  bool sub_norms = false;         // RMSNorm before o_proj and before down_proj (BitNet b1.58)
  bool post_norms = false;        // RMSNorm after o_proj and after down_proj (gemma)
  bool qk_norms = false;          // RMSNorm of every query and key head, before rope (qwen3, gemma)
  bool rope_interleaved = false;  // rotate neighbours (2i, 2i+1) instead of halves (i, i + head_dim/2)
};

}  // namespace bitnet
