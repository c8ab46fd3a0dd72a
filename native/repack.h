// Stored weights into panels, shared out among threads.
//
// Rows come as they lie in a file. For the integer schemes 16 of them become codes row by row in a scratch buffer that stays in
// the cache, and from there tiles (kernels.h); so a format of files and a scheme of panels know nothing of each other.
//
// A fill_* takes n_rows rows from first_row on, a multiple of 16; the last rows but for the end of the matrix are whole panels.
// Sizes are the caller's to check. Stored bytes need no alignment.
#pragma once
#include <cstdint>

#include "linear.h"
#include "threads.h"

namespace bitnet {

// Touches the memory of a fresh matrix, a huge page at a time: else two threads would zero the same page at once.
void prefault(ThreadPool& pool, Linear& w);

// scales [n_rows, n_groups]
void set_scales(Linear& w, int first_row, int n_rows, const float* scales);

// codes [n_rows, cols] as repack_integer has them. Throws std::invalid_argument.
void fill_codes(ThreadPool& pool, Linear& w, int first_row, int n_rows, const int8_t* codes);

// All rows of a ternary matrix, bytes [ceil(rows / 4), cols]: bits 2i..2i+1 of byte [r, c] are the code of row i * ceil(rows / 4) + r.
// False where a code is 3.
bool fill_banded(ThreadPool& pool, Linear& w, const uint8_t* bytes);

// Two-bit codes in blocks of a row: in each stretch of 4 * run codes, number k * run + p lies in byte p at bits 2k, or 6 - 2k.
struct TwoBitBlocks {
  int codes, bytes;  // of a block; codes is a multiple of 4 * run and divides the inputs
  int first_byte;    // of the codes, of which there are codes / 4
  int run;           // bytes: a multiple of 16, or 1
  bool descending;
};
// blocks [n_rows, cols / codes, bytes] into a ternary matrix, in groups of whole blocks. False where a code is 3.
bool fill_two_bit(ThreadPool& pool, Linear& w, int first_row, int n_rows, const uint8_t* blocks, const TwoBitBlocks& layout);

// values [n_rows, cols] as they are into a matrix of their own type, or quantized with its groups, scales and all, into a binary,
// int4, fp4 or int8 one, as ternary.py's quantize_* have it. False where a value, or a scale of int4 or fp4 in f16, is not finite.
bool fill_values(ThreadPool& pool, Linear& w, int first_row, int n_rows, DenseType type, const void* values);

// Codes of panels [panel, panel + n_panels) as gemm_* wants them, [n_panels][inputs / 4][16][4], panel_bytes apart; panel_bytes is at least
// 16 * round_up(cols, 64). Columns give whole runs of four panels from a multiple of four on, as far as their lines go.
void unpack_lines(const Kernels& k, const Linear& w, int panel, int n_panels, uint8_t* codes, int64_t panel_bytes);

// Whether a matrix may lie in lines: ternary, one scale a row.
bool may_lie_in_lines(const Linear& w);
// The same weights in the same memory, lying otherwise. Throws std::invalid_argument where there is no room, or no such lines.
void lay(const Kernels& k, ThreadPool& pool, Linear& w, Lie lie);

}  // namespace bitnet
