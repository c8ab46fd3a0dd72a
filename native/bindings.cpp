// The only file that knows Python. Shapes and sizes are checked on the Python side; what would corrupt memory is checked here again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

#include "forward.h"
#include "repack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitnet {
namespace {

template <typename T, typename Shape>
using Array = nb::ndarray<const T, Shape, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = Array<T, nb::ndim<2>>;
template <typename T>
using Vector = Array<T, nb::ndim<1>>;
using Values = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // of any item

int to_int(size_t n) {
  if (n > 0x7fffffff) throw std::invalid_argument("an array dimension exceeds 2^31");
  return int(n);
}

// Not initialized. From malloc, which keeps what was freed: fresh pages for every token's logits would cost more than their argmax.
template <typename T>
nb::object new_array(std::initializer_list<size_t> shape, T** data) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  *data = static_cast<T*>(std::malloc(std::max<size_t>(1, n) * sizeof(T)));
  if (!*data) throw std::bad_alloc();
  **data = T{};  // gcc would warn of memory that nobody has written
  nb::capsule owner(*data, [](void* p) noexcept { std::free(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, shape, owner));
}

Scheme scheme_named(const std::string& name) {
  if (name == "ternary") return Scheme::ternary;
  if (name == "ternary_base3") return Scheme::ternary_base3;
  if (name == "binary") return Scheme::binary;
  if (name == "int4") return Scheme::int4;
  if (name == "fp4") return Scheme::fp4;
  if (name == "int8") return Scheme::int8;
  if (name == "f16") return Scheme::f16;
  if (name == "bf16") return Scheme::bf16;
  if (name == "f32") return Scheme::f32;
  throw std::invalid_argument("no scheme is called " + name);
}

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "relu2") return Activation::relu2;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("no activation is called " + name);
}

// A model and its caches share ownership: a cache may outlive the Python object of the model it was made for.
struct PyModel {
  PyModel(const Config& c, const std::vector<bool>& windowed, int threads, const Kernels* k) : model(c, windowed, threads, k) {}
  Model model;
  bool complete = false;
};
struct PyCache {
  PyCache(const Config& c, const KvFormat& format, const Adapter* a) : cache(c, format), config(c), adapter(a) {}
  KvCache cache;
  Config config;
  const Adapter* adapter;  // by which its keys and values are made; or null
  bool in_pass = false;    // of which some pass runs now, without the GIL
  // For whom reads or changes more than the length.
  KvCache& idle() {
    if (in_pass) throw std::invalid_argument("a forward pass runs on this sequence; wait for its end");
    return cache;
  }
};
struct PyPage {  // one more owner, by the same count: nanobind's own shared_ptr would begin another
  std::shared_ptr<KvCache::Page> page;
  KvFormat format;
};
struct PyAdapter {
  explicit PyAdapter(PyModel& m) : adapter(m.model.config) {}
  Adapter adapter;
};

// A matrix while its rows come in, by the threads of the model that it is for.
struct PyMatrix {
  PyMatrix(PyModel& m, Scheme scheme, int rows, int cols, int n_groups, const std::string& name)
      : pool(m.model.pool), w(empty_linear(scheme, rows, cols, n_groups, &m.model.arena, m.model.may_lie(name))) {
    nb::gil_scoped_release release;
    prefault(pool, w);
  }
  // Rows that are whole panels but for the matrix's last.
  int check_rows(int first_row, size_t n) const {
    if (!w.rows) throw std::invalid_argument("the matrix was given to a model");
    const int n_rows = to_int(n);
    if (first_row < 0 || first_row % kPanelRows || n_rows < 1 || n_rows > w.rows - first_row || (n_rows % kPanelRows && first_row + n_rows < w.rows))
      throw std::invalid_argument("rows must be runs of 16 within the matrix");
    return n_rows;
  }
  void check_cols(size_t n, int64_t expected) const {
    if (int64_t(n) != expected) throw std::invalid_argument("a row has another size than the matrix");
  }
  void check_scheme(Scheme s) const {
    if (w.scheme != s) throw std::invalid_argument("the matrix is of another scheme");
  }

  void check_ternary() const {
    if (!w.ternary()) throw std::invalid_argument("the matrix is of another scheme");
  }

  void set_scales(int first_row, Matrix<float> scales) {
    const int n = check_rows(first_row, scales.shape(0));
    if (!w.integer()) throw std::invalid_argument("the matrix is of another scheme");
    check_cols(scales.shape(1), w.n_groups);
    nb::gil_scoped_release release;
    bitnet::set_scales(w, first_row, n, scales.data());
  }
  void fill_codes(int first_row, Matrix<int8_t> codes) {
    const int n = check_rows(first_row, codes.shape(0));
    if (!w.integer()) throw std::invalid_argument("the matrix is of another scheme");
    check_cols(codes.shape(1), w.cols);
    nb::gil_scoped_release release;
    bitnet::fill_codes(pool, w, first_row, n, codes.data());
  }
  bool fill_banded(Matrix<uint8_t> bytes) {
    check_rows(0, w.rows), check_ternary(), check_cols(bytes.shape(1), w.cols);
    if (int64_t(bytes.shape(0)) != (w.rows + 3) / 4) throw std::invalid_argument("a byte holds one row in four");
    nb::gil_scoped_release release;
    return bitnet::fill_banded(pool, w, bytes.data());
  }
  bool fill_two_bit(int first_row, Matrix<uint8_t> blocks, int codes, int bytes, int first_byte, int run, bool descending) {
    const int n = check_rows(first_row, blocks.shape(0));
    check_ternary();
    const bool known = codes >= 64 && codes <= 256 && !(codes & (codes - 1)) && (run == 1 || run == 16 || run == 32) && codes % (4 * run) == 0 &&
                       first_byte >= 0 && bytes <= 256 && first_byte + codes / 4 <= bytes && w.cols % codes == 0 && (w.n_groups == 1 || w.group % codes == 0) && !(run == 1 && descending);
    if (!known) throw std::invalid_argument("no such blocks of two bits");
    check_cols(blocks.shape(1), int64_t{w.cols / codes} * bytes);
    nb::gil_scoped_release release;
    return bitnet::fill_two_bit(pool, w, first_row, n, blocks.data(), {codes, bytes, first_byte, run, descending});
  }
  bool fill_values(int first_row, const std::string& type, Matrix<uint8_t> bytes) {
    const int n = check_rows(first_row, bytes.shape(0));
    const Scheme s = scheme_named(type);
    if (s != Scheme::f16 && s != Scheme::bf16 && s != Scheme::f32) throw std::invalid_argument(type + " has no values");
    if (!w.integer() || w.ternary()) check_scheme(s);
    check_cols(bytes.shape(1), int64_t{w.cols} * (s == Scheme::f32 ? 4 : 2));
    nb::gil_scoped_release release;
    return bitnet::fill_values(pool, w, first_row, n, s == Scheme::f32 ? DenseType::f32 : s == Scheme::f16 ? DenseType::f16 : DenseType::bf16, bytes.data());
  }

  ThreadPool& pool;
  Linear w;
};

bool same_sizes(const Config& a, const Config& b) {
  return a.n_layers == b.n_layers && a.hidden_size == b.hidden_size && a.ffn_size == b.ffn_size && a.n_heads == b.n_heads &&
         a.n_kv_heads == b.n_kv_heads && a.head_dim == b.head_dim;
}

const Kernels* kernels_named(const std::string& isa) {
  const char* failed = nullptr;
  const Kernels* k = choose_kernels(isa.c_str(), &failed);
  if (!k) throw std::invalid_argument("the instruction set " + isa + " is unknown or cannot run here");
  return k;
}

Linear make_integer(const std::string& scheme, Matrix<int8_t> codes, Matrix<float> scales) {
  if (scales.shape(0) != codes.shape(0)) throw std::invalid_argument("codes and scales differ in their rows");
  Scheme s = scheme_named(scheme);
  if (s >= Scheme::f16) throw std::invalid_argument(scheme + " has no integer codes");
  return repack_integer(s, codes.data(), scales.data(), to_int(codes.shape(0)), to_int(codes.shape(1)), to_int(scales.shape(1)));
}

// For tests: rows [n, head_dim] as keys and values of one head, then work(..., page, positions in it, stride, out) for every page.
template <typename Work>
nb::object through_cache(const std::string& isa, const KvFormat& format, const Matrix<float>& rows, const Matrix<float>& queries, Work&& work, bool scores) {
  const Kernels& k = *kernels_named(isa);
  const int n = to_int(rows.shape(0)), dim = to_int(rows.shape(1)), n_queries = to_int(queries.shape(0));
  if (dim % 16 || format.key_bits == 16 || (scores ? queries.shape(1) != rows.shape(1) : queries.shape(1) % 16 || queries.shape(1) < rows.shape(0)))
    throw std::invalid_argument("quantized heads of a multiple of 16; weights of as many positions, padded to a multiple of 16");
  Config c;
  c.n_layers = c.n_heads = c.n_kv_heads = 1, c.head_dim = dim;
  KvCache cache(c, format);
  cache.reserve(n);
  for (int i = 0; i < n; i++) {
    const int page = i / KvCache::kPagePositions, slot = i % KvCache::kPagePositions;
    store_key(k, cache, page, slot, 0, 0, rows.data() + int64_t{i} * dim, dim), store_value(k, cache, page, slot, 0, 0, rows.data() + int64_t{i} * dim, dim);
  }
  const size_t width = scores ? (n + 15) / 16 * 16 : dim;
  float* out = nullptr;
  nb::object result = new_array<float>({size_t(n_queries), width}, &out);
  std::fill_n(out, n_queries * width, 0.0f);
  QuantizedAttention attention;
  for (int at = 0; at < n; at += KvCache::kPagePositions)
    work(attention, k, cache, at / KvCache::kPagePositions, std::min(n - at, KvCache::kPagePositions), int64_t(width), out);
  return result;
}

using Batch = std::vector<std::pair<PyCache*, Vector<int32_t>>>;

// While a pass runs without the GIL, nobody else changes its caches.
struct InPass {
  explicit InPass(const Batch& batch) : batch(batch) { mark(true); }
  ~InPass() { mark(false); }
  InPass(const InPass&) = delete;
  void mark(bool on) const {
    for (const auto& [cache, ids] : batch) cache->in_pass = on;
  }
  const Batch& batch;
};

nb::object run_forward(PyModel& m, const Batch& batch, bool all_logits) {
  if (!m.complete) m.model.check_complete(), m.complete = true;
  const Config& c = m.model.config;
  std::vector<Span> spans;
  size_t rows = 0;
  for (const auto& [cache, ids] : batch) {
    const Config& o = cache->config;
    if (o.n_layers != c.n_layers || o.n_kv_heads != c.n_kv_heads || o.head_dim != c.head_dim || (cache->adapter && !same_sizes(cache->adapter->config(), c)))
      throw std::invalid_argument("a cache of another model");
    for (const Span& s : spans)
      if (s.cache == &cache->cache) throw std::invalid_argument("a sequence is in the batch twice");
    const int n = to_int(ids.shape(0));
    if (n < 1 || n > c.max_context - cache->cache.length()) throw std::invalid_argument("no tokens, or more than the context holds");
    for (int i = 0; i < n; i++)
      if (ids(i) < 0 || ids(i) >= c.vocab_size) throw std::invalid_argument("a token id outside the vocabulary");
    spans.push_back({&cache->idle(), ids.data(), n, cache->adapter});
    rows += all_logits ? n : 1;
  }
  if (spans.empty()) throw std::invalid_argument("an empty batch");
  const InPass held(batch);  // before anything that may let others run
  float* logits = nullptr;
  nb::object result = new_array<float>({rows, size_t(c.vocab_size)}, &logits);
  bool raised = false, finished;
  {
    nb::gil_scoped_release release;
    auto last = std::chrono::steady_clock::now();
    finished = forward(m.model, spans, all_logits, logits, [&] {
      auto now = std::chrono::steady_clock::now();
      if (now - last < std::chrono::milliseconds(20)) return false;
      last = now;
      nb::gil_scoped_acquire acquire;
      return raised = PyErr_CheckSignals() != 0;
    });
  }
  if (!finished && raised) throw nb::python_error();
  return result;
}

}  // namespace
}  // namespace bitnet

NB_MODULE(_native, m) {
  using namespace bitnet;
  m.doc() = "The native core. Use bitnet.engine.";

  nb::class_<PyPage>(m, "Page").def_prop_ro("nbytes", [](const PyPage& p) { return p.page->size(); });
  m.attr("PAGE_TOKENS") = KvCache::kPagePositions;

  nb::class_<PyCache>(m, "Cache")
      .def("__len__", [](PyCache& c) { return c.cache.length(); })
      .def_prop_ro("page_bytes", [](PyCache& c) { return c.cache.page_bytes(); })
      .def_prop_ro("bytes_per_token", [](PyCache& c) { return c.cache.bytes_per_token(); })
      .def("pages", [](PyCache& c) {
        std::vector<PyPage> pages;
        for (const auto& page : c.idle().pages()) pages.push_back({page, c.cache.format()});
        return pages;
      })
      .def("share", [](PyCache& c, const std::vector<PyPage>& pages, int n) {
        if (n < 0 || size_t(n) > pages.size() * KvCache::kPagePositions) throw std::invalid_argument("the pages hold fewer tokens");
        std::vector<std::shared_ptr<KvCache::Page>> shared;
        for (const PyPage& p : pages) {
          if (p.format != c.cache.format() || p.page->size() != c.cache.page_bytes()) throw std::invalid_argument("a page of another cache");
          shared.push_back(p.page);
        }
        c.idle().share(std::move(shared), n);
      }, "pages"_a, "n"_a)
      .def("truncate", [](PyCache& c, int n) {
        if (n < 0 || n > c.cache.length()) throw std::invalid_argument("a cache can only become shorter");
        c.idle().truncate(n);
      });

  nb::class_<PyAdapter>(m, "Adapter")
      .def(nb::init<PyModel&>(), "model"_a)
      .def("set_a", [](PyAdapter& self, int layer, const std::string& part, Matrix<int16_t> a, Vector<float> scales) {
             if (scales.shape(0) != a.shape(0)) throw std::invalid_argument("A and its scales differ in their rows");
             self.adapter.set_a(layer, part, a.data(), to_int(a.shape(0)), to_int(a.shape(1)), scales.data());
           }, "layer"_a, "part"_a, "a"_a, "scales"_a)
      .def("set_b", [](PyAdapter& self, int layer, const std::string& part, Matrix<int16_t> b, int first) {
             self.adapter.set_b(layer, part, b.data(), to_int(b.shape(0)), to_int(b.shape(1)), first);
           }, "layer"_a, "part"_a, "b"_a, "first"_a)
      .def_prop_ro("nbytes", [](PyAdapter& self) { return self.adapter.bytes(); });

  nb::class_<PyMatrix>(m, "Matrix")
      .def("__init__", [](PyMatrix* self, PyModel& model, const std::string& scheme, int rows, int cols, int n_groups, const std::string& name) {
             new (self) PyMatrix(model, scheme_named(scheme), rows, cols, n_groups, name);
           }, nb::keep_alive<1, 2>(), "model"_a, "scheme"_a, "rows"_a, "cols"_a, "n_groups"_a = 1, "name"_a = "")
      .def("set_scales", &PyMatrix::set_scales, "first_row"_a, "scales"_a)
      .def("fill_codes", &PyMatrix::fill_codes, "first_row"_a, "codes"_a)
      .def("fill_banded", &PyMatrix::fill_banded, "bytes"_a)
      .def("fill_two_bit", &PyMatrix::fill_two_bit, "first_row"_a, "blocks"_a, nb::kw_only(), "codes"_a, "bytes"_a, "first_byte"_a, "run"_a, "descending"_a)
      .def("fill_values", &PyMatrix::fill_values, "first_row"_a, "type"_a, "bytes"_a)
      // for tests: copies of what lies in memory
      .def("panels", [](PyMatrix& self) {  // without room for scales
        std::string all;
        for (int p = 0; p < self.w.n_panels(); p++) all.append(reinterpret_cast<const char*>(self.w.panels.data()) + p * self.w.panel_bytes, self.w.code_bytes);
        return nb::bytes(all.data(), all.size());
      })
      .def("scales", [](PyMatrix& self) { return nb::bytes(self.w.scales.data(), 4 * self.w.scales.size()); });

  nb::class_<PyModel>(m, "Model")
      .def("__init__",
           [](PyModel* self, int n_layers, int vocab_size, int hidden_size, int ffn_size, int n_heads, int n_kv_heads, int head_dim,
              int max_context, float norm_eps, const std::string& activation, float embedding_scale, float attention_scale,
              float rope_scale, int sliding_window, const std::vector<bool>& windowed, int activation_group, bool sub_norms,
              bool post_norms, bool qk_norms, bool rope_interleaved, int threads, const std::string& isa) {
             if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
             Config c{n_layers, vocab_size, hidden_size, ffn_size, n_heads, n_kv_heads, head_dim, max_context, norm_eps,
                      activation_named(activation), embedding_scale, attention_scale, rope_scale, sliding_window, activation_group,
                      sub_norms, post_norms, qk_norms, rope_interleaved};
             new (self) PyModel(c, windowed, threads, kernels_named(isa));
           },
           nb::kw_only(), "n_layers"_a, "vocab_size"_a, "hidden_size"_a, "ffn_size"_a, "n_heads"_a, "n_kv_heads"_a, "head_dim"_a,
           "max_context"_a, "norm_eps"_a, "activation"_a, "embedding_scale"_a, "attention_scale"_a, "rope_scale"_a, "sliding_window"_a,
           "windowed"_a, "activation_group"_a, "sub_norms"_a, "post_norms"_a, "qk_norms"_a, "rope_interleaved"_a, "threads"_a, "isa"_a)
      .def("set_matrix", [](PyModel& self, const std::string& name, PyMatrix& matrix) {
             if (&matrix.pool != &self.model.pool || !matrix.w.rows) throw std::invalid_argument("a matrix of another model, or given away");
             if (matrix.w.integer()) compact_scales(matrix.w, &self.model.arena);
             self.model.set_linear(name, std::exchange(matrix.w, Linear{}));
           }, "name"_a, "matrix"_a)
      .def("set_random", [](PyModel& self, const std::string& name, const std::string& scheme, int rows, int cols, int n_groups, uint64_t seed) {
             self.model.set_linear(name, random_linear(*self.model.kernels, scheme_named(scheme), rows, cols, n_groups, seed, &self.model.arena, self.model.may_lie(name)));
           }, "name"_a, "scheme"_a, "rows"_a, "cols"_a, "n_groups"_a, "seed"_a)
      .def("set_vector", [](PyModel& self, const std::string& name, Vector<float> v) {
             nb::gil_scoped_release release;  // before waiting: a pass that runs asks Python whether to go on
             self.model.set_vector(name, v.data(), to_int(v.shape(0)));
           }, "name"_a, "values"_a)
      .def("check_complete", [](PyModel& self) { self.model.check_complete(); })
      .def("cache", [](PyModel& self, const PyAdapter* adapter, int key_bits, int value_bits, int group, bool rotate, bool center) {
             if (adapter && !same_sizes(adapter->adapter.config(), self.model.config)) throw std::invalid_argument("an adapter of another model");
             return new PyCache(self.model.config, {key_bits, value_bits, group, rotate, center}, adapter ? &adapter->adapter : nullptr);  // Python owns it
           }, "adapter"_a = nb::none(), "key_bits"_a = 16, "value_bits"_a = 16, "group"_a = 0, "rotate"_a = true, "center"_a = true, nb::keep_alive<0, 2>())
      .def("keys", [](PyModel& self, PyCache& cache, int layer) {
             const Config& c = self.model.config;
             if (!same_sizes(cache.config, c) || cache.cache.format().key_bits < 16 || layer < 0 || layer >= c.n_layers)
               throw std::invalid_argument("the keys of one of this model's layers, in f16");
             float* keys = nullptr;
             nb::object result = new_array<float>({size_t(cache.cache.length()), size_t(c.n_kv_heads) * c.head_dim}, &keys);
             load_keys(*self.model.kernels, c, cache.idle(), layer, keys);
             return result;
           }, "cache"_a, "layer"_a)
      .def("forward", &run_forward, "batch"_a, "all_logits"_a = false)
      .def_prop_rw("activation_group", [](PyModel& self) { return self.model.config.activation_group; },
                   [](PyModel& self, int group) {
                     if (group < 0 || group % 16) throw std::invalid_argument("groups of activations must be a multiple of 16 long");
                     if (group && self.model.skips_zeros()) throw std::invalid_argument("a model that skips zeros has one step per token");
                     nb::gil_scoped_release release;
                     const std::lock_guard<std::mutex> alone(self.model.busy);
                     self.model.config.activation_group = group;
                   })
      .def_prop_ro("profile", [](PyModel& self) {  // seconds of all forward passes since reset_profile
        nb::dict d;
        d["matmul_s"] = self.model.profile.matmul_s, d["attention_s"] = self.model.profile.attention_s, d["total_s"] = self.model.profile.total_s;
        return d;
      })
      .def("reset_profile", [](PyModel& self) { self.model.profile = {}; })
      .def_prop_ro("can_skip_zeros", [](PyModel& self) { return self.model.can_skip_zeros(); })
      .def_prop_ro("skippable_bytes", [](PyModel& self) { return self.model.skippable_bytes(); })
      .def_prop_rw("skips_zeros", [](PyModel& self) { return self.model.skips_zeros(); },
                   [](PyModel& self, bool on) {
                     nb::gil_scoped_release release;
                     self.model.skip_zeros(on);
                   })
      .def_prop_ro("lines", [](PyModel& self) {  // since reset_profile, of passes that skip: rows of up_proj, those read, columns of down_proj, those read
        const Profile& p = self.model.profile;
        return nb::make_tuple(p.up_rows, p.up_rows_read, p.down_columns, p.down_columns_read);
      })
      .def("count_zeros", [](PyModel& self, bool on) {
             nb::gil_scoped_release release;  // before waiting: a pass that runs asks Python whether to go on
             const std::lock_guard<std::mutex> alone(self.model.busy);
             self.model.zeros.assign(on ? self.model.config.n_layers : 0, Zeros{});
           }, "on"_a)
      .def_prop_ro("zeros", [](PyModel& self) {  // [(gates, inputs of down_proj, of how many)] by layer, since count_zeros
        std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> alone(self.model.busy);
        for (const Zeros& z : self.model.zeros) found.emplace_back(z.gates, z.inputs, z.values);
        return found;
      })
      .def_prop_ro("weight_bytes", [](PyModel& self) { return self.model.weight_bytes(); })
      .def_prop_ro("weight_bytes_per_token", [](PyModel& self) { return self.model.weight_bytes_per_token(); })
      .def_prop_ro("threads", [](PyModel& self) { return self.model.pool.size(); })
      .def_prop_ro("isa", [](PyModel& self) { return std::string(self.model.kernels->name); });

  m.def("release_freed_memory", [] {  // what was freed goes back to the system, where the C library can do that
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });

  m.def("missing_instructions", [] {  // of x86-64-v2, which numpy's wheels take for granted; this module does not
    std::vector<std::string> missing;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("ssse3")) missing.push_back("ssse3");
    if (!__builtin_cpu_supports("sse4.1")) missing.push_back("sse4.1");
    if (!__builtin_cpu_supports("sse4.2")) missing.push_back("sse4.2");
    if (!__builtin_cpu_supports("popcnt")) missing.push_back("popcnt");
#endif
    return missing;
  });

  // ---- for tests, benchmarks and `bitnet doctor`
  m.def("matmul_integer", [](const std::string& isa, int threads, const std::string& scheme, Matrix<int8_t> codes, Matrix<float> scales, Matrix<float> x, int activation_group) {
    Linear w = make_integer(scheme, codes, scales);
    if (int(x.shape(1)) != w.cols) throw std::invalid_argument("x and the weights differ in their inputs");
    if (activation_group < 0 || activation_group % 16) throw std::invalid_argument("groups of activations must be a multiple of 16 long");
    ThreadPool pool(threads);
    Activations in(activation_group);
    in.set(x.data(), to_int(x.shape(0)), w.cols);
    float* y = nullptr;
    nb::object result = new_array<float>({x.shape(0), size_t(w.rows)}, &y);
    matmul(*kernels_named(isa), pool, w, in, y);
    return result;
  }, "isa"_a, "threads"_a, "scheme"_a, "codes"_a, "scales"_a, "x"_a, "activation_group"_a = 0);
  m.def("matmul_dense", [](const std::string& isa, int threads, const std::string& scheme, Values values, Matrix<float> x) {
    Scheme s = scheme_named(scheme);
    if (s < Scheme::f16 || values.itemsize() != (s == Scheme::f32 ? 4 : 2)) throw std::invalid_argument("values are not " + scheme);
    Linear w = repack_dense(s, values.data(), to_int(values.shape(0)), to_int(values.shape(1)));
    if (int(x.shape(1)) != w.cols) throw std::invalid_argument("x and the weights differ in their inputs");
    ThreadPool pool(threads);
    Activations in;
    in.set(x.data(), to_int(x.shape(0)), w.cols);
    float* y = nullptr;
    nb::object result = new_array<float>({x.shape(0), size_t(w.rows)}, &y);
    matmul(*kernels_named(isa), pool, w, in, y);
    return result;
  }, "isa"_a, "threads"_a, "scheme"_a, "values"_a, "x"_a);
  m.def("low_rank", [](const std::string& isa, int threads, Matrix<int16_t> a, Matrix<int16_t> b, Vector<float> scales, Matrix<float> x) {
    Config c;  // whose o_proj is a matrix of this size
    c.n_layers = c.n_heads = c.n_kv_heads = 1, c.hidden_size = to_int(b.shape(0)), c.head_dim = to_int(x.shape(1)), c.ffn_size = 1;
    const int rank = to_int(a.shape(0)), n_tokens = to_int(x.shape(0));
    if (b.shape(1) != a.shape(0) || a.shape(1) != x.shape(1) || scales.shape(0) != a.shape(0)) throw std::invalid_argument("x, A and B do not fit");
    Adapter adapter(c);
    adapter.set_a(0, "o", a.data(), rank, to_int(a.shape(1)), scales.data());
    adapter.set_b(0, "o", b.data(), c.hidden_size, rank, 0);
    ThreadPool pool(threads);
    LowRankUpdates updates;
    updates.begin(*kernels_named(isa), {{&adapter, 0, n_tokens}}, 0, kO, x.data());
    pool.run(updates.pieces(), [&](int i, int) { updates.multiply_a(i); });
    float* y = nullptr;
    nb::object result = new_array<float>({x.shape(0), b.shape(0)}, &y);
    std::fill_n(y, x.shape(0) * b.shape(0), 0.0f);
    Linear w;
    w.rows = c.hidden_size, w.cols = c.head_dim;
    updates.add_b(pool, {{&w, y}});
    return result;
  }, "isa"_a, "threads"_a, "a"_a, "b"_a, "scales"_a, "x"_a);
  m.def("quantize", [](const std::string& isa, Matrix<float> x) {
    const Kernels* k = kernels_named(isa);
    int8_t* q = nullptr;
    float* step = nullptr;
    nb::object codes = new_array<int8_t>({x.shape(0), x.shape(1)}, &q), steps = new_array<float>({x.shape(0)}, &step);
    int32_t sum;
    for (size_t t = 0; t < x.shape(0); t++) step[t] = k->quantize(x.data() + t * x.shape(1), to_int(x.shape(1)), q + t * x.shape(1), &sum);
    return nb::make_tuple(codes, steps);
  }, "isa"_a, "x"_a);
  // One head's keys or values through a quantized cache: [queries, keys] scores, or [queries, head_dim] sums of values.
  m.def("kv_scores", [](const std::string& isa, int bits, int group, Matrix<float> keys, Matrix<float> queries, float scale) {
    return through_cache(isa, {bits, bits, group, false}, keys, queries, [&](QuantizedAttention& a, const Kernels& k, KvCache& cache, int page, int n, int64_t stride, float* out) {
      if (page == 0) a.set_queries(k, cache, queries.data(), to_int(queries.shape(0)), scale);
      a.scores(k, cache, page, 0, 0, 0, (n + 15) / 16, out + page * KvCache::kPagePositions, stride);
    }, true);
  }, "isa"_a, "bits"_a, "group"_a, "keys"_a, "queries"_a, "scale"_a);
  m.def("kv_weigh", [](const std::string& isa, int bits, int group, Matrix<float> values, Matrix<float> weights) {
    return through_cache(isa, {bits, bits, group, false}, values, weights, [&](QuantizedAttention& a, const Kernels& k, KvCache& cache, int page, int n, int64_t, float* out) {
      const int pages_at = page * KvCache::kPagePositions;
      a.weigh(k, cache, page, 0, 0, 0, n, weights.data() + pages_at, to_int(weights.shape(1)), to_int(weights.shape(0)), out);
    }, false);
  }, "isa"_a, "bits"_a, "group"_a, "values"_a, "weights"_a);
  m.def("hadamard", [](const std::string& isa, Matrix<float> x, int block) {
    if (block < 1 || (block & (block - 1)) || x.shape(1) % block) throw std::invalid_argument("a block must be a power of two that divides a row");
    float* y = nullptr;
    nb::object result = new_array<float>({x.shape(0), x.shape(1)}, &y);
    std::copy_n(x.data(), x.size(), y);
    kernels_named(isa)->hadamard(y, to_int(x.size()), block);
    return result;
  }, "isa"_a, "x"_a, "block"_a);
  m.def("self_test", [] {
    IsaReport reports[kMaxIsas];
    nb::dict result;
    for (int i = 0, n = test_isas(reports); i < n; i++)
      result[reports[i].name] = !reports[i].supported ? std::string("not supported by this CPU")
                                : reports[i].failure  ? std::string("FAILED in ") + reports[i].failure
                                                      : std::string("ok");
    return result;
  });
  // (the instruction set that runs, a better one that failed its self-test or ""); BITNET_ISA picks one by name.
  m.def("choose_isa", [] {
    const char* failed = nullptr;
    const char* wanted = std::getenv("BITNET_ISA");
    const Kernels* k = choose_kernels(wanted && *wanted ? wanted : nullptr, &failed);
    return std::make_pair(std::string(k ? k->name : ""), std::string(failed ? failed : ""));
  });
  // GB/s of each repetition. As matrices are read: a stream per thread, who is done helps the others.
  m.def("read_bandwidths", [](int64_t bytes, int threads, int repetitions) {
    const char* failed = nullptr;
    const Kernels& k = *choose_kernels(nullptr, &failed);
    constexpr int64_t kPiece = 1 << 20;
    const int pieces = int(bytes / kPiece);
    if (pieces < 1 || threads < 1 || repetitions < 1) throw std::invalid_argument("at least 1 MiB, one thread, one repetition");
    nb::gil_scoped_release release;
    Buffer<uint8_t> memory(pieces * kPiece);
    std::memset(memory.data(), 1, memory.size());
    ThreadPool pool(threads);
    std::vector<double> rates;
    std::atomic<uint64_t> sink{0};
    for (int r = 0; r < repetitions; r++) {
      auto start = std::chrono::steady_clock::now();
      pool.run(pieces, [&](int i, int) { sink += k.read_bytes(memory.data() + i * kPiece, kPiece); });
      rates.push_back(double(memory.size()) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9);
    }
    return rates;
  }, "bytes"_a, "threads"_a, "repetitions"_a);
}
