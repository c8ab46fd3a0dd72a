// Low-rank adapters (LoRA, arXiv:2106.09685), unmerged: y = W x + B (scale (A x)) for the tokens of the sequences that name one.
//
// x is what the matrix's module takes in, in float32, also where W meets it in int8: an adapter is trained beside the module, not inside it.
// A and B are integers of 16 bits (8 where those are enough, as for ternary factors) with a step for each row of A and column of B, whatever
// their file has: beside ternary weights bytes count. A x meets B in 15 bits, so that B's products are whole numbers too.
// A's products join those of the weights, so that nobody waits for them; B's come after, as soon as W x is there.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "config.h"
#include "linear.h"
#include "threads.h"

namespace bitnet {

struct Product;

// The matrices of a layer that read the same x: q, k, v; o; gate, up; down.
enum Reader { kQkv, kO, kGateUp, kDown, kReaders };

// Integers of 8 bits where those hold all of them, else of 16; one of the two is empty.
struct Codes {
  Buffer<int8_t> narrow;
  Buffer<int16_t> wide;
  int64_t bytes() const { return int64_t(narrow.size()) + 2 * int64_t(wide.size()); }
  bool is_narrow() const { return narrow.size() > 0; }
};

// An adapter's part beside the matrices of one reader.
struct LowRank {
  struct Part {
    int rows = 0, rank = 0;  // rank: filled up with zeros to a multiple of 4
    int first = 0;           // row of A that meets its first column; a multiple of 4
    Codes b;                 // panels, see AddCodes
  };
  int ranks = 0, cols = 0;     // A's rows, the parts' one after another, each filled up with zeros to a multiple of 4; 0: nothing here
  int64_t row_inputs = 0;      // from a row to the next: cols rounded up to a multiple of 64
  Codes a;                     // [ranks, row_inputs], see DotCodes
  Buffer<float> scales;        // [ranks]: of A x, less the 2^16 or 2^24 of A
  std::array<Part, 3> parts;   // in the order of the products; without rows where a matrix has no adapter
  int64_t bytes() const;
};

class Adapter {
 public:
  explicit Adapter(const Config& config) : config_(config), layers_(config.n_layers) {}
  // Beside the matrices that read the same x as layers.N.`part`: codes [ranks, cols], scales [ranks]: alpha / rank
  // times the steps of A's row and B's column.
  void set_a(int layer, const std::string& part, const int16_t* codes, int ranks, int cols, const float* scales);
  // Of layers.N.`part`: codes [rows, rank]; `first`: the row of A that they begin to meet. After set_a. Both throw std::invalid_argument.
  void set_b(int layer, const std::string& part, const int16_t* codes, int rows, int rank, int first);
  const LowRank& at(int layer, Reader reader) const { return layers_[layer][reader]; }
  const Config& config() const { return config_; }
  int64_t bytes() const;

 private:
  Config config_;
  Arena arena_;  // before what lies in it
  std::vector<std::array<LowRank, kReaders>> layers_;
};

// What the adapters of a batch add to the products of one x.
class LowRankUpdates {
 public:
  struct Tokens {
    const Adapter* adapter;
    int first, n;  // of the batch
  };
  // x [tokens, cols] is read until add_b is done.
  void begin(const Kernels& k, const std::vector<Tokens>& tokens, int layer, Reader reader, const float* x);
  int pieces() const { return int(pieces_.size()); }  // of A x; from any thread
  void multiply_a(int piece);
  void add_b(ThreadPool& pool, std::initializer_list<Product> products);  // after A x and the products

 private:
  struct Piece {
    const LowRank* w;
    int row, n_rows, first, n;  // rows of A, tokens of the batch
    int64_t inner;
  };
  struct Update {
    const LowRank* w;
    int first, n;   // tokens of the batch
    int64_t inner;  // where its [n, ranks] begins
  };
  const Kernels* k_ = nullptr;
  const float* x_ = nullptr;
  std::vector<Update> updates_;
  std::vector<Piece> pieces_;
  Buffer<float> inner_;  // scale (A x)
};

}  // namespace bitnet
