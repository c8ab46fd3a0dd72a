#include "model.h"

#include <cstring>
#include <stdexcept>

namespace bitnet {

Model::Model(const Config& c, int n_threads, const Kernels* k) : config(c), kernels(k), pool(n_threads), layers(c.n_layers) {
  const bool valid = c.n_layers > 0 && c.vocab_size > 0 && c.hidden_size > 0 && c.ffn_size > 0 && c.n_heads > 0 && c.n_kv_heads > 0 &&
                     c.head_dim > 0 && c.head_dim % 2 == 0 && c.n_heads % c.n_kv_heads == 0 && c.max_context > 0;
  if (!valid) throw std::invalid_argument("the configuration has a size that is zero, or heads that do not divide");
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  linears_["embedding"] = {&embedding, c.vocab_size, c.hidden_size};
  linears_["head"] = {&head, c.vocab_size, c.hidden_size};
  vectors_["final_norm"] = {&final_norm, c.hidden_size};
  vectors_["rope_inverse"] = {&rope_inverse, c.head_dim / 2};
  for (int i = 0; i < c.n_layers; i++) {
    Layer& l = layers[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    linears_[at + "q"] = {&l.q, q, c.hidden_size};
    linears_[at + "k"] = {&l.k, kv, c.hidden_size};
    linears_[at + "v"] = {&l.v, kv, c.hidden_size};
    linears_[at + "o"] = {&l.o, c.hidden_size, q};
    linears_[at + "gate"] = {&l.gate, c.ffn_size, c.hidden_size};
    linears_[at + "up"] = {&l.up, c.ffn_size, c.hidden_size};
    linears_[at + "down"] = {&l.down, c.hidden_size, c.ffn_size};
    vectors_[at + "attn_norm"] = {&l.attn_norm, c.hidden_size};
    vectors_[at + "ffn_norm"] = {&l.ffn_norm, c.hidden_size};
    if (c.sub_norms) {
      vectors_[at + "attn_sub_norm"] = {&l.attn_sub_norm, q};
      vectors_[at + "ffn_sub_norm"] = {&l.ffn_sub_norm, c.ffn_size};
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
  *to = std::move(w);
}

void Model::set_vector(const std::string& name, const float* values, int n) {
  auto slot = vectors_.find(name);
  if (slot == vectors_.end()) throw std::invalid_argument("no vector is called " + name);
  if (n != slot->second.n)
    throw std::invalid_argument(name + " has " + std::to_string(n) + " elements, expected " + std::to_string(slot->second.n));
  *slot->second.to = Buffer<float>(n);
  std::memcpy(slot->second.to->data(), values, n * sizeof(float));
}

void Model::check_complete() const {
  for (const auto& [name, slot] : linears_)
    if (slot.to->rows == 0 && name != "head") throw std::invalid_argument(name + " was not set");
  for (const auto& [name, slot] : vectors_)
    if (slot.to->size() == 0) throw std::invalid_argument(name + " was not set");
}

int64_t Model::weight_bytes_per_token() const {
  int64_t bytes = 0;
  for (const auto& [name, slot] : linears_)
    if (slot.to != &embedding && slot.to != &head) bytes += slot.to->bytes();
  for (const auto& [name, slot] : vectors_) bytes += int64_t(slot.to->size()) * 4;
  return bytes + output().bytes();
}

}  // namespace bitnet
