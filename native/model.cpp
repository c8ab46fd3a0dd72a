#include "model.h"

#include <cstring>
#include <stdexcept>

#include "repack.h"

namespace bitnet {

Model::Model(const Config& c, const std::vector<bool>& windowed, int n_threads, const Kernels* k)
    : config(c), kernels(k), pool(n_threads), layers(c.n_layers) {
  const bool valid = c.n_layers > 0 && c.vocab_size > 0 && c.hidden_size > 0 && c.ffn_size > 0 && c.n_heads > 0 && c.n_kv_heads > 0 &&
                     c.head_dim > 0 && c.head_dim % 2 == 0 && c.n_heads % c.n_kv_heads == 0 && c.max_context > 0;
  if (!valid) throw std::invalid_argument("the configuration has a size that is zero, or heads that do not divide");
  if (c.activation_group < 0 || c.activation_group % 16) throw std::invalid_argument("groups of activations must be a multiple of 16 long");
  bool any_windowed = false;
  for (bool w : windowed) any_windowed |= w;
  if (int(windowed.size()) != c.n_layers || (any_windowed && c.sliding_window < 1))
    throw std::invalid_argument("windowed layers need a window of 1 or more positions, and every layer a mark");
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  linears_["embedding"] = {&embedding, c.vocab_size, c.hidden_size};
  linears_["head"] = {&head, c.vocab_size, c.hidden_size};
  vectors_["final_norm"] = {&final_norm, c.hidden_size};
  vectors_["rope_inverse"] = {&rope_inverse, c.head_dim / 2};
  if (any_windowed) vectors_["rope_inverse_local"] = {&rope_inverse_local, c.head_dim / 2};
  for (int i = 0; i < c.n_layers; i++) {
    Layer& l = layers[i];
    l.windowed = windowed[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    auto add_linear = [&](const char* name, Linear& to, int rows, int cols) {
      linears_[at + name] = {&to, rows, cols};
      vectors_[at + name + "_bias"] = {&to.bias, rows, true};
    };
    add_linear("q", l.q, q, c.hidden_size);
    add_linear("k", l.k, kv, c.hidden_size);
    add_linear("v", l.v, kv, c.hidden_size);
    add_linear("o", l.o, c.hidden_size, q);
    add_linear("gate", l.gate, c.ffn_size, c.hidden_size);
    add_linear("up", l.up, c.ffn_size, c.hidden_size);
    add_linear("down", l.down, c.hidden_size, c.ffn_size);
    vectors_[at + "key_center"] = {&l.key_center, c.n_kv_heads * c.head_dim, true};
    vectors_[at + "attn_norm"] = {&l.attn_norm, c.hidden_size};
    vectors_[at + "ffn_norm"] = {&l.ffn_norm, c.hidden_size};
    if (c.sub_norms) {
      vectors_[at + "attn_sub_norm"] = {&l.attn_sub_norm, q};
      vectors_[at + "ffn_sub_norm"] = {&l.ffn_sub_norm, c.ffn_size};
    }
    if (c.post_norms) {
      vectors_[at + "post_attn_norm"] = {&l.post_attn_norm, c.hidden_size};
      vectors_[at + "post_ffn_norm"] = {&l.post_ffn_norm, c.hidden_size};
    }
    if (c.qk_norms) {
      vectors_[at + "q_norm"] = {&l.q_norm, c.head_dim};
      vectors_[at + "k_norm"] = {&l.k_norm, c.head_dim};
    }
  }
}

void Model::set_linear(const std::string& name, Linear w) {
  auto slot = linears_.find(name);
  if (slot == linears_.end()) throw std::invalid_argument("no matrix is called " + name);
  auto [to, rows, cols] = slot->second;
  if (w.rows != rows || w.cols != cols)
    throw std::invalid_argument(name + " is " + std::to_string(w.rows) + " x " + std::to_string(w.cols) + ", expected " +
                                std::to_string(rows) + " x " + std::to_string(cols));
  w.bias = std::move(to->bias);
  *to = std::move(w);
}

void Model::set_vector(const std::string& name, const float* values, int n) {
  auto slot = vectors_.find(name);
  if (slot == vectors_.end()) throw std::invalid_argument("no vector is called " + name);
  if (n != slot->second.n)
    throw std::invalid_argument(name + " has " + std::to_string(n) + " elements, expected " + std::to_string(slot->second.n));
  const std::lock_guard<std::mutex> alone(busy);
  *slot->second.to = Buffer<float>(n);
  std::memcpy(slot->second.to->data(), values, n * sizeof(float));
}

bool Model::can_skip_zeros() const {
  bool can = config.activation == Activation::relu2 && !config.activation_group;
  for (const Layer& l : layers) can = can && may_lie_in_lines(l.up) && may_lie_in_lines(l.down);
  return can;
}

int64_t Model::skippable_bytes() const {
  int64_t bytes = 0;
  for (const Layer& l : layers) bytes += l.up.laid_bytes() + l.down.laid_bytes();
  return bytes;
}

void Model::skip_zeros(bool on) {
  const std::lock_guard<std::mutex> alone(busy);
  if (on && !can_skip_zeros()) throw std::invalid_argument("this model has no zeros to skip");
  for (Layer& l : layers) {
    lay(*kernels, pool, l.up, on ? Lie::rows : Lie::panels);
    lay(*kernels, pool, l.down, on ? Lie::columns : Lie::panels);
  }
}

void Model::check_complete() const {
  for (const auto& [name, slot] : linears_)
    if (slot.to->rows == 0 && name != "head") throw std::invalid_argument(name + " was not set");
  for (const auto& [name, slot] : vectors_)
    if (slot.to->size() == 0 && !slot.optional) throw std::invalid_argument(name + " was not set");
}

int64_t Model::weight_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, slot] : linears_) bytes += slot.to->bytes();
  for (const auto& [name, slot] : vectors_) bytes += int64_t(slot.to->size()) * 4;
  return bytes;
}

int64_t Model::weight_bytes_per_token() const { return weight_bytes() - (head.rows ? embedding.bytes() : 0); }

}  // namespace bitnet
