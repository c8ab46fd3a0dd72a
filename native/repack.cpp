#include "repack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "words.h"

namespace bitnet {
namespace {

constexpr int kBlock = 1280;  // columns unpacked at once, 20 KB: a multiple of 256, the longest block of a file, of 32 and of 20

// Codes [16, kBlock], for fp4 E2M1 numbers, n columns from the first of a vector on, into the vectors of a panel from `to` on.
template <int kTiles, int kBits>
void pack(const uint8_t* codes, int n, uint8_t* to) {
  constexpr int kInputs = 4 * kTiles, kColumns = kTiles == 5 ? 80 : kTiles == 8 ? 32 : 16, kVectors = kColumns / kInputs;
  for (int c = 0; c < n; c += kColumns, to += 64 * kVectors)
    for (int g = 0; g < 4; g++) {
      Words t[kColumns / 4];
      for (int i = 0; i < kColumns / 16; i++) transpose_words(codes + 4 * g * kBlock + c + 16 * i, kBlock, t + 4 * i);
      for (int v = 0; v < std::min(kVectors, (n - c + kInputs - 1) / kInputs); v++) {
        const Words* tiles = t + v * kTiles;
        if constexpr (kTiles == 5) {
          store(to + 64 * v + 16 * g, join_base3(tiles));
        } else {
          Words joined = kBits == 1 ? tiles[0] >> 1 : tiles[0];  // a binary code is twice its bit
          for (int s = 1; s < kTiles; s++) joined |= tiles[s] << (kBits == 1 ? s - 1 : kBits * s);
          store(to + 64 * v + 16 * g, joined);
        }
      }
    }
}
constexpr int kPackColumns = 160;  // a multiple of every kColumns

void pack(Scheme scheme, const uint8_t* codes, int n, uint8_t* to) {
  if (scheme == Scheme::ternary) pack<4, 2>(codes, n, to);
  else if (scheme == Scheme::ternary_base3) pack<5, 0>(codes, n, to);
  else if (scheme == Scheme::binary) pack<8, 1>(codes, n, to);
  else if (scheme == Scheme::int4 || scheme == Scheme::fp4) pack<2, 4>(codes, n, to);
  else pack<1, 8>(codes, n, to);
}

// decode(row, first, n, out) gives n codes of a row from column `first` on, a multiple of kBlock after the beginning of a group.
template <typename Decode>
void fill_panel(Linear& w, int panel, const Decode& decode) {
  alignas(64) uint8_t codes[kPanelRows * kBlock];
  const int row0 = panel * kPanelRows, n_rows = std::min(kPanelRows, w.rows - row0), inputs = layout(w.scheme).inputs();
  if (n_rows < kPanelRows) std::memset(codes + n_rows * kBlock, 0, (kPanelRows - n_rows) * kBlock);
  uint8_t* to = w.panels.data() + panel * w.panel_bytes;
  const bool in_one = w.group % inputs == 0;  // no group leaves a part of its last vector empty
  const int run = in_one ? w.cols : w.group;
  for (int begin = 0; begin < w.cols; begin += run, to += int64_t{64} * w.group_vectors) {
    const int end = std::min(w.cols, begin + run);
    for (int first = begin; first < end; first += kBlock) {
      const int n = std::min(kBlock, end - first), padded = std::min(kBlock, round_up(n, kPackColumns));
      for (int r = 0; r < n_rows; r++) {
        decode(row0 + r, first, n, codes + r * kBlock);
        std::memset(codes + r * kBlock + n, 0, padded - n);
      }
      pack(w.scheme, codes, n, to + int64_t{64} * ((first - begin) / inputs));
    }
  }
}

bool worth_sharing(const Linear& w, int n_panels) { return int64_t{n_panels} * w.cols >= 4096; }

template <typename Decode>
void fill_panels(ThreadPool& pool, Linear& w, int first_row, int n_rows, const Decode& decode) {
  const int first = first_row / kPanelRows, n = (n_rows + kPanelRows - 1) / kPanelRows;
  pool.run(n, [&](int i, int) { fill_panel(w, first + i, decode); }, worth_sharing(w, n));
}

// Set by any thread, read after all are done.
class Flag {
 public:
  void set_if(bool raised) {
    if (raised) raised_.store(true, std::memory_order_relaxed);
  }
  bool raised() const { return raised_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> raised_{false};
};

bool any_three(const uint8_t* bytes, int n) {
  uint8_t threes = 0;
  for (int i = 0; i < n; i++) threes = uint8_t(threes | (bytes[i] & bytes[i] >> 1));
  return threes & 0x55;  // the low bit of each pair is left where both are set
}

template <int kShift>
void shift_down(const uint8_t* bytes, int n, uint8_t* out) {
  for (int i = 0; i < n; i++) out[i] = bytes[i] >> kShift & 3;
}
void take_field(const uint8_t* bytes, int n, int shift, uint8_t* out) {
  switch (shift) {
    case 0: return shift_down<0>(bytes, n, out);
    case 2: return shift_down<2>(bytes, n, out);
    case 4: return shift_down<4>(bytes, n, out);
    default: return shift_down<6>(bytes, n, out);
  }
}

// ---- values
struct F32 {
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7f800000;
  static float widen(Bits b) { return std::bit_cast<float>(b); }
};
struct Bf16 {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80;
  static float widen(Bits b) { return std::bit_cast<float>(uint32_t{b} << 16); }
};
struct F16 {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7c00;
  static float widen(Bits b) {  // of finite ones
    const uint32_t sign = uint32_t(b & 0x8000) << 16, magnitude = b & 0x7fff;
    const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
    const uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
    return std::bit_cast<float>(sign | (magnitude < 0x400 ? std::bit_cast<uint32_t>(subnormal) : normal));
  }
};

template <typename Type>
typename Type::Bits bits_at(const uint8_t* values, int64_t i) { return load<typename Type::Bits>(values + i * sizeof(typename Type::Bits)); }

// The bits of the largest magnitude; not below kInfinity if one is not finite.
template <typename Type>
typename Type::Bits absmax_bits(const uint8_t* values, int n) {
  using Bits = typename Type::Bits;
  using Signed = std::make_signed_t<Bits>;
  Signed most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, Signed(bits_at<Type>(values, i) & Bits(Bits(~Bits{0}) >> 1)));
  return Bits(most);
}

// out = clip(round half to even(value * (1 / scale)), -top, top) + bias; of 0 for a scale of 0
template <typename Type>
void quantize_run(const uint8_t* values, int n, float scale, float top, int bias, uint8_t* out) {
  const float inverse = scale > 0 ? 1 / scale : 0.0f;
  if (!std::isfinite(inverse)) {  // a scale below 2^-128: every value but zero is beyond the top
    for (int i = 0; i < n; i++) {
      const float v = Type::widen(bits_at<Type>(values, i));
      out[i] = uint8_t((v > 0 ? int(top) : v < 0 ? -int(top) : 0) + bias);
    }
    return;
  }
  constexpr float kMagic = 0x1.8p23f;  // x + magic has no bits for a fraction, and the sum rounds half to even
  const int32_t base = std::bit_cast<int32_t>(kMagic) - bias;
  for (int i = 0; i < n; i++) {
    float x = Type::widen(bits_at<Type>(values, i)) * inverse;
    x = x < top ? x : top;
    x = x > -top ? x : -top;
    out[i] = uint8_t(std::bit_cast<int32_t>(x + kMagic) - base);
  }
}

// out = the E2M1 number of the nearest doubled value, as ternary.py's quantize_fp4 has it; of 0 for a scale of 0
template <typename Type>
void quantize_fp4_run(const uint8_t* values, int n, float scale, uint8_t* out) {
  const float inverse = scale > 0 ? 1 / scale : 0.0f;
  for (int i = 0; i < n; i++) {
    const float x = Type::widen(bits_at<Type>(values, i)) * inverse, a = std::fabs(x);
    const int number = (a > 0.5f) + (a >= 1.5f) + (a > 2.5f) + (a >= 3.5f) + (a > 5) + (a >= 7) + (a > 10);
    out[i] = uint8_t(number + 8 * (x < 0 && number));
  }
}

template <typename Type>
void quantize_signs(const uint8_t* values, int n, uint8_t* out) {
  for (int i = 0; i < n; i++) out[i] = Type::widen(bits_at<Type>(values, i)) < 0 ? 0 : 2;
}

// The mean magnitude, as ternary.py's quantize_binary has it.
template <typename Type>
float mean_magnitude(const uint8_t* values, int n) {
  double s[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int l = 0; l < std::min(8, n - i); l++) s[l] += std::fabs(Type::widen(bits_at<Type>(values, i + l)));
  return float((((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) / n);
}

// To the nearest that f16 holds; false where that is infinity. n is a multiple of 16.
bool round_to_f16(float* scales, int n) {
  uint16_t halves[kPanelRows];
  bool finite = true;
  for (int i = 0; i < n; i += kPanelRows) {
    kScalar.store_f16(scales + i, kPanelRows, halves);
    kScalar.load_f16(halves, kPanelRows, scales + i);
    for (int r = 0; r < kPanelRows; r++) finite &= halves[r] < F16::kInfinity;
  }
  return finite;
}

template <typename Type>
bool quantize_rows(ThreadPool& pool, Linear& w, int first_row, int n_rows, const uint8_t* values) {
  const float top = float(layout(w.scheme).top - layout(w.scheme).bias);
  const bool half_scales = w.scheme == Scheme::int4 || w.scheme == Scheme::fp4;
  const int64_t row_bytes = int64_t{w.cols} * sizeof(typename Type::Bits);
  const int first = first_row / kPanelRows, n = (n_rows + kPanelRows - 1) / kPanelRows, bias = layout(w.scheme).bias;
  Flag infinite;
  pool.run(n, [&](int i, int) {
    const int panel = first + i;
    float* scales = &w.scales[size_t(panel) * w.n_groups * kPanelRows];  // [n_groups, 16]
    for (int r = panel * kPanelRows; r < std::min(w.rows, (panel + 1) * kPanelRows); r++)
      for (int g = 0; g < w.n_groups; g++) {
        const int from = g * w.group;
        const uint8_t* group = values + (r - first_row) * row_bytes + from * sizeof(typename Type::Bits);
        const int inputs = std::min(w.group, w.cols - from);
        const auto most = absmax_bits<Type>(group, inputs);
        if (most >= Type::kInfinity) return infinite.set_if(true);
        scales[g * kPanelRows + r % kPanelRows] = w.scheme == Scheme::binary ? mean_magnitude<Type>(group, inputs) : Type::widen(most) / top;
      }
    if (half_scales && !round_to_f16(scales, w.n_groups * kPanelRows)) return infinite.set_if(true);
    fill_panel(w, panel, [&](int r, int from, int count, uint8_t* out) {
      const uint8_t* row = values + (r - first_row) * row_bytes;
      for (int c = from, next; c < from + count; c = next) {
        next = std::min(from + count, (c / w.group + 1) * w.group);
        const float scale = scales[c / w.group * kPanelRows + r % kPanelRows];
        const uint8_t* run = row + c * sizeof(typename Type::Bits);
        if (w.scheme == Scheme::fp4) quantize_fp4_run<Type>(run, next - c, scale, out + c - from);
        else if (w.scheme == Scheme::binary) quantize_signs<Type>(run, next - c, out + c - from);
        else quantize_run<Type>(run, next - c, scale, top, bias, out + c - from);
      }
    });
  }, worth_sharing(w, n));
  return !infinite.raised();
}

// 16 rows of as many columns as a vector of 16 bytes holds, into [columns][16 rows]; adds to `infinite` where a value is none.
inline void transpose_values(const uint8_t* from, int64_t stride, uint8_t* to, Words& infinite) {  // of 32 bits
  Words t[4];
  const Words mask = {F32::kInfinity, F32::kInfinity, F32::kInfinity, F32::kInfinity};
  for (int g = 0; g < 4; g++) {
    transpose_words(from + 4 * g * stride, stride, t);
    for (int s = 0; s < 4; s++) store(to + 64 * s + 16 * g, t[s]), infinite |= (Words)((t[s] & mask) == mask);
  }
}
inline void transpose_values(const uint8_t* from, int64_t stride, uint8_t* to, Halves& infinite, uint16_t exponent) {  // of 16 bits
  const Halves mask = Halves{} + exponent;
  for (int g = 0; g < 2; g++) {
    Halves r[8];
    for (int i = 0; i < 8; i++) {
      r[i] = load<Halves>(from + (8 * g + i) * stride);
      infinite |= (Halves)((r[i] & mask) == mask);
    }
    for (int h = 0; h < 2; h++) {  // columns 4h..4h+3
      Words t[4];
      for (int i = 0; i < 4; i++) t[i] = (Words)(h ? high(r[2 * i], r[2 * i + 1]) : low(r[2 * i], r[2 * i + 1]));
      const Words a = low(t[0], t[1]), b = high(t[0], t[1]), c = low(t[2], t[3]), d = high(t[2], t[3]);
      uint8_t* at = to + 128 * h + 16 * g;
      store(at, low_pair(a, c)), store(at + 32, high_pair(a, c)), store(at + 64, low_pair(b, d)), store(at + 96, high_pair(b, d));
    }
  }
}

template <typename Type>
bool copy_rows(ThreadPool& pool, Linear& w, int first_row, int n_rows, const uint8_t* values) {
  using Bits = typename Type::Bits;
  constexpr int kSize = sizeof(Bits), kColumns = 16 / kSize;
  const int64_t row_bytes = int64_t{w.cols} * kSize;
  const int first = first_row / kPanelRows, n = (n_rows + kPanelRows - 1) / kPanelRows;
  Flag infinite;
  pool.run(n, [&](int i, int) {
    const uint8_t* from = values + int64_t{i} * kPanelRows * row_bytes;
    uint8_t* to = w.panels.data() + (first + i) * w.panel_bytes;
    const int rows = std::min(kPanelRows, w.rows - (first + i) * kPanelRows);
    int c = 0;
    if (rows == kPanelRows) {
      if constexpr (kSize == 4) {
        Words bad{};
        for (; c + kColumns <= w.cols; c += kColumns) transpose_values(from + c * kSize, row_bytes, to + c * kSize * kPanelRows, bad);
        infinite.set_if(bad[0] | bad[1] | bad[2] | bad[3]);
      } else {
        Halves bad{};
        for (; c + kColumns <= w.cols; c += kColumns)
          transpose_values(from + c * kSize, row_bytes, to + c * kSize * kPanelRows, bad, Type::kInfinity);
        for (int k = 0; k < 8; k++) infinite.set_if(bad[k]);
      }
    }
    for (; c < w.cols; c++)
      for (int r = 0; r < rows; r++) {
        const Bits bits = bits_at<Type>(from + r * row_bytes, c);
        infinite.set_if((bits & Type::kInfinity) == Type::kInfinity);
        store(to + (c * kPanelRows + r) * kSize, bits);
      }
  }, worth_sharing(w, n));
  return !infinite.raised();
}

template <typename Type>
bool fill_typed(ThreadPool& pool, Linear& w, int first_row, int n_rows, const uint8_t* values) {
  return w.integer() ? quantize_rows<Type>(pool, w, first_row, n_rows, values) : copy_rows<Type>(pool, w, first_row, n_rows, values);
}
}  // namespace

void prefault(ThreadPool& pool, Linear& w) {
  const size_t begin = reinterpret_cast<size_t>(w.panels.data()), end = begin + w.panels.size();
  if (end - begin < kHugePage) return;
  const size_t first = begin / kHugePage, last = (end - 1) / kHugePage;
  pool.run(int(last - first + 1), [&](int i, int) {
    const size_t from = std::max(begin, (first + i) * kHugePage), to = std::min(end, (first + i + 1) * kHugePage);
    for (size_t at = from; at < to; at += 4096) *reinterpret_cast<volatile uint8_t*>(at) = 0;
  });
}

namespace {
// Words of rows into tiles, or of tiles into rows: 16 rows, `stride` apart, and inputs / 4 tiles of 16 x 4; inputs is a multiple of 16.
void rows_to_tiles(const uint8_t* rows, int64_t stride, int64_t inputs, uint8_t* tiles) {
  Words t[4];
  for (int64_t c = 0; c < inputs; c += 16)
    for (int g = 0; g < 4; g++) {
      transpose_words(rows + 4 * g * stride + c, stride, t);
      for (int s = 0; s < 4; s++) store(tiles + 16 * c + 64 * s + 16 * g, t[s]);
    }
}
void tiles_to_rows(const uint8_t* tiles, int64_t inputs, uint8_t* rows, int64_t stride) {
  Words t[4];
  for (int64_t c = 0; c < inputs; c += 16)
    for (int g = 0; g < 4; g++) {
      transpose_words(tiles + 16 * c + 16 * g, 64, t);
      for (int s = 0; s < 4; s++) store(rows + (4 * g + s) * stride + c, t[s]);
    }
}

// Packed bytes of 16 codes of each of D digits, which lie `stride` apart.
template <int D>
Bytes join(const uint8_t* codes, int64_t stride) {
  Words t[D];
  for (int s = 0; s < D; s++) t[s] = load<Words>(codes + s * stride);
  if constexpr (D == 5) return join_base3(t);
  else return (Bytes)(t[0] | t[1] << 2 | t[2] << 4 | t[3] << 6);
}

// Codes as unpack_lines gives them, with zeros after the inputs, to where `w` keeps them.
template <int D>
void pack_lines(Linear& w, int panel, int n_panels, const uint8_t* codes, int64_t panel_bytes) {
  const int64_t line_bytes = w.line_bytes(), padded = panel_bytes / 16;
  if (w.lie == Lie::panels) {
    for (int p = 0; p < n_panels; p++)
      for (int64_t b = 0; b < w.code_bytes; b += 64)
        for (int g = 0; g < 64; g += 16) {
          alignas(16) uint8_t tiles[D * 16] = {};
          for (int s = 0; s < D; s++)
            if (const int64_t at = D * b + 64 * s; at < panel_bytes) std::memcpy(tiles + 16 * s, codes + p * panel_bytes + at + g, 16);
          store(w.panels.data() + (panel + p) * w.panel_bytes + b + g, join<D>(tiles, 16));
        }
  } else if (w.lie == Lie::rows) {
    std::vector<uint8_t> rows(kPanelRows * D * line_bytes);
    for (int p = 0; p < n_panels; p++) {
      const int64_t inputs = std::min(padded, D * line_bytes);
      tiles_to_rows(codes + p * panel_bytes, inputs, rows.data(), D * line_bytes);
      for (int r = 0; r < std::min(kPanelRows, w.rows - (panel + p) * kPanelRows); r++)
        for (int64_t b = 0; b < line_bytes; b += 16)
          store(w.panels.data() + ((panel + p) * kPanelRows + r) * line_bytes + b, join<D>(&rows[(r * line_bytes + b / 64 * 64) * D + b % 64], 64));
    }
  } else {  // all panels of a vector, which starts at `panel`
    alignas(16) uint8_t none[64] = {}, zipped[64];
    for (int c = 0; c < w.cols; c += 4)
      for (int i = 0; i < 4; i++) {
        for (int g = 0; g < 64; g += 16) {
          alignas(16) uint8_t tiles[D * 16];
          for (int s = 0; s < D; s++) std::memcpy(tiles + 16 * s, (4 * s + i < n_panels ? codes + (4 * s + i) * panel_bytes + 16 * c : none) + g, 16);
          store(zipped + g, join<D>(tiles, 16));
        }
        for (int col = 0; col < std::min(4, w.cols - c); col++) {
          uint8_t* to = w.panels.data() + (c + col) * line_bytes + int64_t{panel} / (4 * D) * 64 + 4 * i;
          for (int l = 0; l < 4; l++)
            for (int r = 0; r < 4; r++) to[16 * l + r] = zipped[16 * l + 4 * r + col];
        }
      }
  }
}
}  // namespace

void unpack_lines(const Kernels& k, const Linear& w, int panel, int n_panels, uint8_t* codes, int64_t panel_bytes) {
  const bool base3 = w.scheme == Scheme::ternary_base3;
  const Unpack unpack = base3 ? k.unpack_b3 : k.unpack_t2;
  const int digits = layout(w.scheme).tiles;
  const int64_t line_bytes = w.line_bytes();
  if (w.lie == Lie::columns) {
    for (int p = 0; p < n_panels; p += 4)
      (base3 ? k.unpack_columns_b3 : k.unpack_columns_t2)(w.panels.data() + int64_t{panel + p} / (4 * digits) * 64, line_bytes, w.cols, (panel + p) / 4 % digits,
                                                         codes + p * panel_bytes, panel_bytes);
    return;
  }
  static thread_local Buffer<uint8_t> scratch;
  const int64_t stride = digits * line_bytes + 64;  // an odd number of cache lines
  uint8_t* rows = scratch.reserve(kPanelRows * stride);
  for (int p = 0; p < n_panels; p++) {
    for (int r = 0; r < kPanelRows; r++) {
      const int row = (panel + p) * kPanelRows + r;
      if (row < w.rows) unpack(w.panels.data() + row * line_bytes, line_bytes / 64, kPanelRows * line_bytes, rows + r * stride);
      else std::memset(rows + r * stride, 0, stride);
    }
    rows_to_tiles(rows, stride, std::min(digits * line_bytes, panel_bytes / 16), codes + p * panel_bytes);
  }
}

bool may_lie_in_lines(const Linear& w) { return w.ternary() && w.n_groups == 1; }

void lay(const Kernels& k, ThreadPool& pool, Linear& w, Lie lie) {
  if (w.lie == lie) return;
  if (!may_lie_in_lines(w)) throw std::invalid_argument("only ternary weights with one scale a row can lie in lines");
  Linear to = empty_linear(w.scheme, w.rows, w.cols, 1, nullptr, lie);
  to.lie = lie;
  if (to.laid_bytes() > int64_t(w.panels.size()) - kSlack) throw std::invalid_argument("the matrix has no room to lie otherwise");
  const int together = 4 * layout(w.scheme).tiles, n = (w.n_panels() + together - 1) / together;
  const int64_t panel_bytes = int64_t{16} * round_up(w.padded_cols, 64);
  pool.run(n, [&](int i, int) {
    static thread_local Buffer<uint8_t> scratch;
    const int panel = i * together, n_panels = std::min(together, w.n_panels() - panel);
    uint8_t* codes = scratch.reserve(together * panel_bytes + 2 * kSlack);
    std::memset(codes, 0, together * panel_bytes);
    if (w.lie == Lie::panels)
      for (int p = 0; p < n_panels; p++)
        (w.scheme == Scheme::ternary_base3 ? k.unpack_b3 : k.unpack_t2)(w.panels.data() + (panel + p) * w.panel_bytes, w.code_bytes / 64, 4096, codes + p * panel_bytes);
    else unpack_lines(k, w, panel, n_panels, codes, panel_bytes);
    if (w.lie == Lie::columns)  // what follows the last column
      for (int p = 0; p < n_panels; p++)
        for (int c = w.cols; c % 4; c++)
          for (int r = 0; r < kPanelRows; r++) codes[p * panel_bytes + 16 * (c / 4 * 4) + 4 * r + c % 4] = 0;
    if (w.scheme == Scheme::ternary_base3) pack_lines<5>(to, panel, n_panels, codes, panel_bytes);
    else pack_lines<4>(to, panel, n_panels, codes, panel_bytes);
  });
  std::memset(w.panels.data(), 0, w.panels.size());
  std::memcpy(w.panels.data(), to.panels.data(), to.laid_bytes());
  w.lie = lie;
}

void set_scales(Linear& w, int first_row, int n_rows, const float* scales) {
  for (int r = first_row; r < first_row + n_rows; r++)
    for (int g = 0; g < w.n_groups; g++) w.scales[(size_t(r / kPanelRows) * w.n_groups + g) * kPanelRows + r % kPanelRows] = *scales++;
}

void fill_codes(ThreadPool& pool, Linear& w, int first_row, int n_rows, const int8_t* codes) {
  const CodeLayout code = layout(w.scheme);
  const unsigned bias = code.bias;
  uint8_t fp4[256];  // the E2M1 number of a code
  for (unsigned c = 0; c < 256; c++) fp4[c] = uint8_t(bits_of_code(Scheme::fp4, c));
  Flag wrong;
  fill_panels(pool, w, first_row, n_rows, [&](int row, int first, int n, uint8_t* out) {
    const int8_t* from = codes + int64_t{row - first_row} * w.cols + first;
    uint8_t most = 0;
    for (int i = 0; i < n; i++) out[i] = uint8_t(from[i] + bias), most = std::max(most, out[i]);  // below -bias wraps to a large one
    bool none = most > code.top;
    if (w.scheme == Scheme::binary)
      for (int i = 0; i < n; i++) none |= out[i] & 1;
    if (w.scheme == Scheme::fp4)
      for (int i = 0; i < n; i++) none |= (out[i] = fp4[out[i]]) > 15;
    wrong.set_if(none);
  });
  if (wrong.raised()) throw std::invalid_argument(std::string("a weight is none of ") + code.weights);
}

bool fill_banded(ThreadPool& pool, Linear& w, const uint8_t* bytes) {
  const int band = (w.rows + 3) / 4, quarter = (w.n_panels() + 3) / 4;
  Flag threes;
  const auto decode = [&](int row, int first, int n, uint8_t* out) {
    const uint8_t* from = bytes + int64_t{row % band} * w.cols + first;
    if (row < band) threes.set_if(any_three(from, n));
    take_field(from, n, 2 * (row / band), out);
  };
  pool.run(quarter, [&](int i, int) {  // four panels of the same bytes, as long as bands are whole panels
    for (int panel = i; panel < w.n_panels(); panel += quarter) fill_panel(w, panel, decode);
  }, worth_sharing(w, w.n_panels()));
  return !threes.raised();
}

bool fill_two_bit(ThreadPool& pool, Linear& w, int first_row, int n_rows, const uint8_t* blocks, const TwoBitBlocks& layout) {
  const int64_t row_bytes = int64_t{w.cols / layout.codes} * layout.bytes;
  Flag threes;
  fill_panels(pool, w, first_row, n_rows, [&](int row, int first, int n, uint8_t* out) {
    const uint8_t* block = blocks + (row - first_row) * row_bytes + int64_t{first / layout.codes} * layout.bytes;
    Words bad{};
    for (int c = 0; c < n; c += layout.codes, block += layout.bytes)
      for (int at = 0; at < layout.codes / 4; at += 16) {  // a block of 64 has no more
        const Words bytes = load<Words>(block + layout.first_byte + at);
        bad |= bytes & bytes >> 1;
        Words fields[4];
        for (int k = 0; k < 4; k++) fields[k] = bytes >> (layout.descending ? 6 - 2 * k : 2 * k) & 0x03030303;
        uint8_t* to = out + c + 4 * at;
        if (layout.run == 1) {  // the four codes of a byte are neighbours
          const Bytes even = low((Bytes)fields[0], (Bytes)fields[1]), odd = low((Bytes)fields[2], (Bytes)fields[3]);
          const Bytes even1 = high((Bytes)fields[0], (Bytes)fields[1]), odd1 = high((Bytes)fields[2], (Bytes)fields[3]);
          store(to, low((Halves)even, (Halves)odd)), store(to + 16, high((Halves)even, (Halves)odd));
          store(to + 32, low((Halves)even1, (Halves)odd1)), store(to + 48, high((Halves)even1, (Halves)odd1));
        } else {
          to += at % layout.run - 4 * (at % layout.run);  // from the beginning of the stretch
          for (int k = 0; k < 4; k++) store(to + k * layout.run, fields[k]);
        }
      }
    threes.set_if((bad[0] | bad[1] | bad[2] | bad[3]) & 0x55555555);
  });
  return !threes.raised();
}

bool fill_values(ThreadPool& pool, Linear& w, int first_row, int n_rows, DenseType type, const void* values) {
  const uint8_t* bytes = static_cast<const uint8_t*>(values);
  if (type == DenseType::f32) return fill_typed<F32>(pool, w, first_row, n_rows, bytes);
  if (type == DenseType::bf16) return fill_typed<Bf16>(pool, w, first_row, n_rows, bytes);
  return fill_typed<F16>(pool, w, first_row, n_rows, bytes);
}

}  // namespace bitnet
