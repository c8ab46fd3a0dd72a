#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace bitnet {
namespace {

constexpr int kMaxCols = 65536;  // the bound of the int32 accumulators, see kernels.h

// Whether a panel has room for its scales: for one a row, which as a second stream cost 5 % of the bandwidth. Ternary rows mostly share one.
// Groups' lie apart: read with the codes they were slower (docs/log.md).
bool room_for_scales(const Linear& w) { return w.n_groups == 1 && !w.ternary(); }

Linear shaped(Scheme scheme, int rows, int cols, int n_groups, Arena* arena, Lie may_lie = Lie::panels) {
  if (rows < 1 || cols < 1 || cols > kMaxCols) throw std::invalid_argument("a matrix needs 1 or more rows and 1 to 65536 columns");
  Linear w;
  w.scheme = scheme, w.rows = rows, w.cols = cols;
  if (w.integer()) {
    const int per_vector = layout(scheme).inputs();
    w.group = n_groups == 1 ? cols : round_up((cols + n_groups - 1) / n_groups, 16);
    if (n_groups < 1 || (cols + w.group - 1) / w.group != n_groups)
      throw std::invalid_argument("groups must be equal runs of inputs, a multiple of 16 long");
    w.n_groups = n_groups;
    w.group_vectors = (w.group + per_vector - 1) / per_vector;
    const int last = cols - (n_groups - 1) * w.group, last_vectors = (last + per_vector - 1) / per_vector;
    w.padded_cols = (n_groups - 1) * w.group + last_vectors * per_vector;
    w.code_bytes = int64_t{64} * ((n_groups - 1) * w.group_vectors + last_vectors);
    w.panel_bytes = w.code_bytes + (room_for_scales(w) ? kPanelRows * sizeof(float) : 0);
    w.scales = Buffer<float>(size_t(w.n_panels()) * n_groups * kPanelRows);
  } else {
    w.padded_cols = round_up(cols, 4);
    w.code_bytes = w.panel_bytes = int64_t{w.padded_cols} * kPanelRows * (scheme == Scheme::f32 ? 4 : 2);
  }
  int64_t room = w.n_panels() * w.panel_bytes;
  if (w.ternary() && may_lie != Lie::panels) room = std::max(room, (may_lie == Lie::rows ? rows : cols) * w.line_bytes(may_lie));
  w.panels = Buffer<uint8_t>(size_t(room) + kSlack, arena);
  return w;
}

// Calls visit(col, byte, tile) for every fourth column of a row of an integer matrix: the codes of col..col+3 lie in the four bytes
// from `byte`, as those of tile `tile` of their vector.
template <typename Visit>
void for_each_quad(const Linear& w, int row, Visit visit) {
  const CodeLayout codes = layout(w.scheme);
  int64_t byte = row / kPanelRows * w.panel_bytes + 4 * (row % kPanelRows);
  for (int first = 0; first < w.cols; first += w.group, byte += int64_t{64} * w.group_vectors) {
    int64_t at = byte;
    for (int col = first, end = std::min(w.cols, first + w.group); col < end; at += 64)
      for (int s = 0; s < codes.tiles && col < end; s++, col += 4) visit(col, at, s);
  }
}
// The scales of a panel, wherever they lie, as float [n_groups, 16].
void copy_scales(const Kernels& k, const Linear& w, int panel, float* out) {
  const IntegerMatrix m = w.view();
  for (int g = 0; g < w.n_groups; g++) {
    const int64_t at = panel * m.panel_scales + int64_t{g} * kPanelRows;
    if (m.scales) std::copy_n(m.scales + at, kPanelRows, out + g * kPanelRows);
    else k.load_f16(m.half_scales + at, kPanelRows, out + g * kPanelRows);
  }
}

// The same weights from two-bit codes to base-3.
Linear repack_base3(const Kernels& k, const Linear& two_bit, Arena* arena, Lie may_lie = Lie::panels) {
  Linear w = shaped(Scheme::ternary_base3, two_bit.rows, two_bit.cols, two_bit.n_groups, arena, may_lie);
  const int most_tiles = std::max(two_bit.group_vectors * 4, w.group_vectors * 5);
  Buffer<uint8_t> tiles(size_t(most_tiles) * 64);
  const int64_t last = two_bit.code_bytes / 64 - int64_t{two_bit.n_groups - 1} * two_bit.group_vectors;
  const int64_t last3 = w.code_bytes / 64 - int64_t{w.n_groups - 1} * w.group_vectors;
  for (int p = 0; p < w.n_panels(); p++) {
    copy_scales(k, two_bit, p, &w.scales[size_t(p) * w.n_groups * kPanelRows]);
    for (int g = 0; g < w.n_groups; g++) {
      const bool ends = g + 1 == w.n_groups;
      const int64_t n2 = ends ? last : two_bit.group_vectors, n3 = ends ? last3 : w.group_vectors;
      std::memset(tiles.data(), 0, tiles.size());
      k.unpack_t2(two_bit.panels.data() + p * two_bit.panel_bytes + int64_t{64} * g * two_bit.group_vectors, n2, 4096, tiles.data());
      uint8_t* to = w.panels.data() + p * w.panel_bytes + int64_t{64} * g * w.group_vectors;
      for (int64_t v = 0; v < n3; v++, to += 64) {
        const uint8_t* from = tiles.data() + 320 * v;
        for (int i = 0; i < 64; i++) {
          const unsigned h = from[128 + i] + 3u * from[192 + i] + 9u * from[256 + i];
          to[i] = uint8_t(9 * h + from[i] + 3 * from[64 + i] + (h * 37 >> 8));  // h / 7, for h < 27
        }
      }
    }
  }
  compact_scales(w, arena);
  return w;
}
}  // namespace

void compact_scales(Linear& w, Arena* arena) {
  auto keep = [&](size_t n) {  // the first n, as they are
    Buffer<float> kept(n, arena);
    std::copy_n(w.scales.data(), n, kept.data());
    w.scales = std::move(kept);
  };
  if (w.n_groups == 1) {
    const float first = w.scales[0];
    if (std::all_of(w.scales.data(), w.scales.data() + w.rows, [&](float s) { return std::memcmp(&s, &first, sizeof s) == 0; })) {
      std::fill_n(w.scales.data(), kPanelRows, first);
      w.scales_lie = Linear::Scales::one;
      return keep(kPanelRows);
    }
    if (!room_for_scales(w)) return keep(w.scales.size());
    for (int p = 0; p < w.n_panels(); p++)
      std::memcpy(w.panels.data() + p * w.panel_bytes + w.code_bytes, &w.scales[size_t(p) * kPanelRows], kPanelRows * sizeof(float));
    w.scales_lie = Linear::Scales::in_panels, w.scales = Buffer<float>();
    return;
  }
  const int n = int(std::min<size_t>(w.scales.size(), 1 << 20));  // pieces: the kernels count in int
  Buffer<uint16_t> halves(w.scales.size(), arena);
  std::vector<float> back(n);
  for (size_t at = 0; at < w.scales.size(); at += n) {
    const int here = int(std::min<size_t>(n, w.scales.size() - at));
    kScalar.store_f16(&w.scales[at], here, &halves[at]);
    kScalar.load_f16(&halves[at], here, back.data());
    if (std::memcmp(back.data(), &w.scales[at], here * sizeof(float))) return keep(w.scales.size());
  }
  w.scales_lie = Linear::Scales::apart_f16, w.half_scales = std::move(halves);
  w.scales = Buffer<float>();
}

Linear repack_integer(Scheme scheme, const int8_t* codes, const float* scales, int rows, int cols, int n_groups) {
  if (scheme == Scheme::ternary_base3) return repack_base3(kScalar, repack_integer(Scheme::ternary, codes, scales, rows, cols, n_groups), nullptr);
  Linear w = shaped(scheme, rows, cols, n_groups, nullptr);
  const int bits = layout(scheme).bits;
  const unsigned bias = layout(scheme).bias;
  uint8_t* packed = w.panels.data();
  for (int r = 0; r < rows; r++) {
    const int8_t* row = codes + int64_t{r} * cols;
    bool wrong = false;
    for_each_quad(w, r, [&](int col, int64_t byte, int tile) {
      for (int i = 0; i < std::min(4, cols - col); i++) {
        const int stored = bits_of_code(scheme, unsigned(row[col + i]) + bias);  // below -bias wraps to a large one
        wrong |= stored < 0;
        packed[byte + i] = uint8_t(packed[byte + i] | stored << bits * tile);
      }
    });
    if (wrong) throw std::invalid_argument(std::string("a weight is none of ") + layout(scheme).weights);
    for (int g = 0; g < n_groups; g++)
      w.scales[(size_t(r / kPanelRows) * n_groups + g) * kPanelRows + r % kPanelRows] = scales[int64_t{r} * n_groups + g];
  }
  compact_scales(w, nullptr);
  return w;
}

Linear repack_dense(Scheme scheme, const void* values, int rows, int cols, Arena* arena) {
  Linear w = shaped(scheme, rows, cols, 1, arena);
  const size_t size = scheme == Scheme::f32 ? 4 : 2;
  for (int r = 0; r < rows; r++) {
    const uint8_t* from = static_cast<const uint8_t*>(values) + size_t(r) * cols * size;
    uint8_t* to = w.panels.data() + r / kPanelRows * w.panel_bytes + r % kPanelRows * size;
    for (int c = 0; c < cols; c++) std::memcpy(to + c * kPanelRows * size, from + c * size, size);
  }
  return w;
}

Linear empty_linear(Scheme scheme, int rows, int cols, int n_groups, Arena* arena, Lie may_lie) {
  return shaped(scheme, rows, cols, n_groups, arena, may_lie);
}

Linear random_linear(const Kernels& k, Scheme scheme, int rows, int cols, int n_groups, uint64_t seed, Arena* arena, Lie may_lie) {
  if (scheme == Scheme::ternary_base3)
    return repack_base3(k, random_linear(k, Scheme::ternary, rows, cols, n_groups, seed, nullptr), arena, may_lie);
  Linear w = shaped(scheme, rows, cols, n_groups, arena, may_lie);
  uint64_t state = seed * 2 + 1;
  auto next = [&state] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 32; };
  float scale = 1.0f / std::sqrt(float(cols));
  if (scheme == Scheme::int4 || scheme == Scheme::fp4) scale /= 4;
  if (scheme == Scheme::int8) scale /= 64;
  // Kept as a model's would be: those of groups in f16, but int8's in float; one for all rows of ternary weights, else one a row.
  if (n_groups > 1) scale = std::ldexp(scheme == Scheme::int8 ? 1.1f : 1.0f, std::ilogb(scale));
  for (size_t i = 0; i < w.scales.size(); i++) w.scales[i] = n_groups > 1 || w.ternary() || i % 2 ? scale : scale * 1.125f;
  const size_t bytes = w.panels.size();
  if (scheme == Scheme::ternary) {
    for (size_t i = 0; i < bytes; i += 4) {  // four codes of 0..2 a byte: the low bit of each pair only where the high one is clear
      uint32_t r = uint32_t(next()), high = r & 0xaaaaaaaau, low = r & 0x55555555u & ~(high >> 1);
      r = high | low;
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  } else if (w.integer()) {
    for (size_t i = 0; i < bytes; i += 4) {
      const uint32_t r = uint32_t(next());
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  } else {
    if (scheme == Scheme::f32) throw std::invalid_argument("random f32 matrices are not made: benchmark f16 or bf16");
    // +-2^exponent * (1 + fraction), two at a time: no infinities, no subnormals
    const uint32_t mantissa = scheme == Scheme::f16 ? 10 : 7, bias = scheme == Scheme::f16 ? 15 : 127;
    const uint32_t exponent = uint32_t(std::ilogb(scale) + int(bias)) << mantissa, kept = 0x8000 | ((1u << mantissa) - 1);
    for (size_t i = 0; i < bytes; i += 4) {
      const uint32_t r = (uint32_t(next()) & (kept << 16 | kept)) | exponent << 16 | exponent;
      std::memcpy(w.panels.data() + i, &r, 4);
    }
  }
  if (w.integer()) compact_scales(w, arena);
  return w;
}

void dequantize_row(const Kernels& k, const Linear& w, int row, float* out) {
  if (w.integer()) {
    const CodeLayout codes = layout(w.scheme);
    std::vector<float> scales(size_t(w.n_groups) * kPanelRows);
    copy_scales(k, w, row / kPanelRows, scales.data());
    auto code = [&](int byte, int tile) {
      if (codes.bits) return code_of_bits(w.scheme, byte >> codes.bits * tile & ((1 << codes.bits) - 1));
      const int l = byte % 64 % 9, h = byte / 64 * 7 + byte % 64 / 9;
      return tile == 0 ? l % 3 : tile == 1 ? l / 3 : tile == 2 ? h % 3 : tile == 3 ? h / 3 % 3 : h / 9;
    };
    for_each_quad(w, row, [&](int col, int64_t byte, int tile) {
      for (int i = 0; i < std::min(4, w.cols - col); i++)
        out[col + i] = float(code(w.panels[byte + i], tile) - codes.bias) * scales[col / w.group * kPanelRows + row % kPanelRows];
    });
    return;
  }
  const size_t size = w.scheme == Scheme::f32 ? 4 : 2;
  const uint8_t* from = w.panels.data() + row / kPanelRows * w.panel_bytes + row % kPanelRows * size;
  if (w.scheme == Scheme::f16) {
    const int padded = round_up(w.cols, 16);
    std::vector<uint16_t> halves(padded);
    std::vector<float> wide(padded);
    for (int c = 0; c < w.cols; c++) std::memcpy(&halves[c], from + c * kPanelRows * size, size);
    k.load_f16(halves.data(), padded, wide.data());
    std::copy_n(wide.begin(), w.cols, out);
    return;
  }
  for (int c = 0; c < w.cols; c++) {
    uint32_t bits = 0;  // bf16 is the upper half of a float32; little-endian
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - size, from + c * kPanelRows * size, size);
    std::memcpy(out + c, &bits, 4);
  }
}

}  // namespace bitnet
