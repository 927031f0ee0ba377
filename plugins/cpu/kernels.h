// The inner loops, compiled once for each instruction set, and the table that the running processor gets.
#pragma once
#include <cstdint>

namespace ha::cpu {

constexpr int kRows = 64;       // query rows of a tile; they lie along the vector lanes
constexpr int kTileKeys = 96;   // keys absorbed at once
constexpr int kPoolGroup = 16;  // key pools that lie side by side in the packed layout
constexpr int kMaxHeadDim = 256;
constexpr int kMaxProjections = 16;

// Up to kRows query rows of one key head and what they have met so far. All arrays are row-minor: [..][kRows].
struct Tile {
  int rows;
  int head_dim, head_dim_v;
  float exponent;   // scale * log2(e): probabilities are powers of two
  float* queries;   // [head_dim][kRows], 0 behind the last row
  float* logits;    // [kTileKeys][kRows]
  float* sums;      // [head_dim_v][kRows], weighted values over 2^reference
  float* reference; // [kRows], base-2 logarithm that `sums` and `totals` are relative to
  float* totals;    // [kRows]
};

// Keys for a tile to absorb: rows `index[0..count)` of k and v, at most kTileKeys.
struct KeySet {
  const float* k;
  const float* v;
  const int32_t* index;
  int count;
  const float* weights;         // [count] factor on each key's probability; null = 1
  const int32_t* last_visible;  // [kRows] largest key index that each row sees; null = all
};

// Packed key pools: byte pairs along the head, [group][pairs][kPoolGroup][2].
struct PackedPools {
  const int8_t* values;
  const float* factors;  // [group][kPoolGroup], NaN where the pool is skipped
  int pairs;
};

struct Kernels {
  const char* name;
  // Online softmax: adds the keys to the tile.
  void (*absorb)(const Tile& tile, const KeySet& keys);
  // Rule 20: scores[p] = max over query pools of float(q8.k8) * factor, times the key pool's factor, for the pools of groups
  // [first, last); -inf where the pool is skipped. `queries` holds int16 pairs [pairs][count], count a multiple of
  // kScoreQueries.
  void (*score)(const int32_t* queries, const float* factors, int count, const PackedPools& keys, int64_t first, int64_t last,
                float* scores);
  // Rules 18 and 20: mean of `rows` rows of x, quantised; gives max|x|/127, or NaN when the mean is not finite.
  float (*pool)(const float* x, int64_t rows, int dim, int8_t* values);
  // Rule 26: codes of `tokens` rows of x. `signs` [dim][kMaxProjections] holds the sign bit of each entry of the matrix, `least`
  // [kMaxProjections] what each sum has to be above.
  void (*hash)(const float* x, int64_t tokens, int dim, const uint32_t* signs, const float* least, int projections, uint16_t* codes);
};

constexpr int kScoreQueries = 4;

// The best table for this processor. The environment variable HYPERATTENTION_CPU (avx512, avx2, generic) asks for one by
// name; a name that is unknown or that this processor cannot run throws Error.
const Kernels& kernels();

}  // namespace ha::cpu
