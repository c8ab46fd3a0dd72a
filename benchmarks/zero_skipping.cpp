// What skipping single zeros, tiles, rows and columns brings, on one core: a matrix of ternary weights times one int8 activation row.
// Built by cmake -DBITNET_BENCHMARKS=ON; prints one JSON object a line. Every way gives the sums of the dense one, or the program fails.
//
//   dense    the engine's own two-bit kernel, all weights
//   element  a loop over inputs that leaves out zero weights by a branch, as the article describes it
//   list     the columns of each row's nonzero weights, found beforehand: no branch, but 16 bits for each of them
//   tile     tiles of 16 rows x 16 inputs (64 bytes, one vector of the kernel) that are all zero are left out by a bit of a mask
//   rows     rows whose result nobody needs are not read: those of up_proj whose gate is zero
//   columns  columns whose activation is zero are not read
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "zero_skip.h"
#include "repack.h"

using namespace bitnet;

namespace {
std::mt19937 rng(1);

double median_us(const std::function<void()>& work) {
  std::vector<double> times;
  const auto begin = std::chrono::steady_clock::now();
  do {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  } while (times.size() < 11 || (times.size() < 2001 && std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(300)));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void report(const char* way, int rows, int cols, double zeros, double us, double dense_us, double read) {
  std::printf("{\"way\": \"%s\", \"rows\": %d, \"cols\": %d, \"zeros\": %.3f, \"us\": %.2f, \"of_dense\": %.3f, \"bytes_read_of_dense\": %.3f}\n", way, rows,
              cols, zeros, us, us / dense_us, read);
  std::fflush(stdout);
}
void require(bool same, const char* way) {
  if (same) return;
  std::printf("%s gives other sums\n", way);
  std::exit(1);
}

// A matrix of `rows` x `cols` of which a share is zero: each weight by itself, or tile by tile.
void weights(const Kernels& k, int rows, int cols, double zeros, bool tiles) {
  std::vector<int8_t> trits(size_t(rows) * cols);
  std::bernoulli_distribution zero(zeros);
  std::vector<uint8_t> none(size_t(rows / 16) * (cols / 16));
  for (uint8_t& n : none) n = tiles && zero(rng);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) {
      const bool is_zero = tiles ? none[r / 16 * (cols / 16) + c / 16] : zero(rng);
      trits[size_t(r) * cols + c] = is_zero ? 0 : tiles ? int8_t(int(rng() % 3) - 1) : rng() % 2 ? 1 : -1;
    }
  std::vector<float> scales(rows, 1.0f), x(cols), expected(rows), y(rows);
  for (float& v : x) v = float(int(rng() % 255) - 127);
  x[0] = 127;
  ThreadPool pool(1);
  Linear w = repack_integer(Scheme::ternary, trits.data(), scales.data(), rows, cols, 1);
  Activations in;
  in.set(x.data(), 1, cols);
  const double dense = median_us([&] { matmul(k, pool, w, in, expected.data()); });
  report("dense", rows, cols, zeros, dense, dense, 1);
  const QuantizedRows q = in.rows(0, 1);
  const float step = q.steps[0];
  if (!tiles) {
    const double element = median_us([&] {
      for (int r = 0; r < rows; r++) {
        int32_t sum = 0;
        const int8_t* row = &trits[size_t(r) * cols];
        for (int c = 0; c < cols; c++) {
          if (row[c] == 0) continue;
          sum += row[c] > 0 ? q.q[c] : -q.q[c];
          __asm__ volatile("" : "+r"(sum));  // a compiler would turn the branch into a product, which skips nothing
        }
        y[r] = float(sum) * step;
      }
    });
    require(y == expected, "element");
    report("element", rows, cols, zeros, element, dense, 4);
    std::vector<uint16_t> lists;
    std::vector<size_t> ends;
    for (int r = 0; r < rows; r++)
      for (int sign : {1, -1}) {
        for (int c = 0; c < cols; c++)
          if (trits[size_t(r) * cols + c] == sign) lists.push_back(uint16_t(c));
        ends.push_back(lists.size());
      }
    const double list = median_us([&] {
      size_t at = 0;
      for (int r = 0; r < rows; r++) {
        int32_t plus = 0, minus = 0;
        for (; at < ends[2 * r]; at++) plus += q.q[lists[at]];
        for (; at < ends[2 * r + 1]; at++) minus += q.q[lists[at]];
        y[r] = float(plus - minus) * step;
      }
    });
    require(y == expected, "list");
    report("list", rows, cols, zeros, list, dense, double(lists.size()) * 16 / (2.0 * rows * cols));
  }
  // Whole tiles: a bit for each vector of a panel, and the kernel once for each run of vectors that are not zero.
  const int vectors = int(w.code_bytes / 64);
  std::vector<uint8_t> used(size_t(w.n_panels()) * vectors);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) used[size_t(r / 16) * vectors + c / 16] |= trits[size_t(r) * cols + c] != 0;
  size_t n_used = 0;
  for (uint8_t u : used) n_used += u;
  const double tile = median_us([&] {
    for (int p = 0; p < w.n_panels(); p++) {
      Run runs[4096];
      int32_t sums[4096];
      int n = 0;
      for (int v = 0; v < vectors;) {
        if (!used[size_t(p) * vectors + v]) {
          v++;
          continue;
        }
        int end = v;
        while (end < vectors && used[size_t(p) * vectors + end]) end++;
        runs[n] = {16 * v, std::min(cols, 16 * end) - 16 * v, v, end - v, 0, 0};
        sums[n] = k.sum_i8(q.q + 16 * v, runs[n].inputs), n++, v = end;
      }
      QuantizedRows some = q;
      some.runs = runs, some.n_runs = n, some.run_sums = sums;
      k.multiply_t2(w.view(), some, p, 1, y.data());
    }
  });
  require(y == expected, "tile");
  report(tiles ? "tile (whole tiles zero)" : "tile", rows, cols, zeros, tile, dense, double(n_used) / used.size());
}

// Rows that nobody needs, or columns that meet a zero.
void lines(const Kernels& k, int rows, int cols, double zeros, Lie lie, int threads, int matrices) {
  ThreadPool pool(threads);
  std::vector<Linear> dense, laid;
  const int n = lie == Lie::rows ? rows : cols;
  std::vector<float> gates(n), x(cols), expected(rows), y(rows);
  std::bernoulli_distribution zero(zeros);
  for (float& g : gates) g = zero(rng) ? -1.0f : 1.0f;
  for (int i = 0; i < cols; i++) x[i] = lie == Lie::columns && gates[i] < 0 ? 0.0f : float(int(rng() % 255) - 127) + 0.5f;
  for (int i = 0; i < matrices; i++) {
    dense.push_back(random_linear(k, Scheme::ternary_base3, rows, cols, 1, i));
    laid.push_back(random_linear(k, Scheme::ternary_base3, rows, cols, 1, i, nullptr, lie));
    lay(k, pool, laid.back(), lie);
  }
  Activations in;
  in.set(x.data(), 1, cols);
  const double all = median_us([&] { for (Linear& w : dense) matmul(k, pool, w, in, expected.data()); }) / matrices;
  Marks marks;
  double read = 0;
  const double some = median_us([&] {
    for (Linear& w : laid) {
      in.quantize(k, pool, w);
      const QuantizedRows q = in.rows(0, 1);
      lie == Lie::rows ? marks.set_gates(k, gates.data(), 1, n) : marks.set_activations(k, q.q, q.stride, 1, n);
      read = double(marks.read()) / n;
      multiply_lines(k, pool, w, in, &marks, y.data());
    }
  }) / matrices;
  for (int r = 0; r < rows; r++)
    if (lie == Lie::columns || gates[r] > 0) require(y[r] == expected[r], "lines");
  report(lie == Lie::rows ? "rows" : "columns", rows, cols, zeros, some, all, read);
}
}  // namespace

int main() {
  const char* failed = nullptr;
  const Kernels* k = choose_kernels(std::getenv("BITNET_ISA"), &failed);
  if (!k) return 1;
  std::printf("{\"isa\": \"%s\"}\n", k->name);
  for (auto [rows, cols] : {std::pair{256, 256}, {2560, 2560}})
    for (double zeros : {0.33, 0.5, 0.8}) weights(*k, rows, cols, zeros, false);
  for (double zeros : {0.33, 0.8}) weights(*k, 2560, 2560, zeros, true);
  for (double zeros : {0.33, 0.5, 0.8})  // the article's size, in the cache
    for (Lie lie : {Lie::rows, Lie::columns}) lines(*k, 256, 256, zeros, lie, 1, 1);
  const int threads = std::min(2, int(std::thread::hardware_concurrency()));
  for (double zeros : {0.5, 0.8, 0.9}) {
    lines(*k, 6912, 2560, zeros, Lie::rows, threads, 100);
    lines(*k, 2560, 6912, zeros, Lie::columns, threads, 100);
  }
}
