// How the attention kernels are launched: pure functions of shape and attributes, tested without a GPU.
#pragma once
#include "launch_config.h"

namespace ha {

constexpr int kMostAttendWarps = 8;
constexpr int kStepRing = 4;  // steps that are described, and whose key lists are held, at once
constexpr int kAttendSharedLimit = 163 * 1024;  // sm_80 grants this, sm_90 more; 99 KB of sm_86 and sm_89 do up to 128
constexpr int kStepBytes = 48, kRowInfoBytes = 16, kWalkBytes = 384;

// Head sizes that there are kernels for. A build may leave some out (HYPERATTENTION_HEAD_SIZES of CMakeLists.txt): HA_HEAD_SIZES
// has a bit for each that is built, and problems of the others are padded further.
constexpr int kPaddedHeads[] = {32, 64, 96, 128, 192, 256};
#ifndef HA_HEAD_SIZES
#define HA_HEAD_SIZES 63
#endif
constexpr bool has_padded_head(int padded) {
  for (int i = 0; i < 6; ++i) {
    if (kPaddedHeads[i] == padded) return (HA_HEAD_SIZES >> i & 1) != 0;
  }
  return false;
}
constexpr int largest_head() {
  int largest = 0;
  for (const int padded : kPaddedHeads) largest = has_padded_head(padded) ? padded : largest;
  return largest;
}
static_assert(largest_head() > 0, "HYPERATTENTION_HEAD_SIZES names no head size");

// The padded head size of the kernels that take these sizes: the smallest instance that holds both, or 0.
inline int padded_head(int64_t head_dim, int64_t head_dim_v) {
  for (const int padded : kPaddedHeads) {
    if (has_padded_head(padded) && max64(head_dim, head_dim_v) <= padded) return padded;
  }
  return 0;
}

// How one block of threads works: warps of `warp_rows` query rows each, steps of `keys` keys, a ring of `buffers` that keys and
// values pass through. All of it fits kAttendSharedLimit; `blocks_per_sm` blocks fit the registers, too.
struct AttendShape {
  int warps, warp_rows, keys, buffers, blocks_per_sm;
  HA_INLINE constexpr int threads() const { return warps * 32; }
  HA_INLINE constexpr int rows() const { return warps * warp_rows; }
};

// The table of shapes, by bytes of an element and padded head size.
HA_INLINE constexpr AttendShape attend_shape(int element_bytes, int padded) {
  if (element_bytes == 4) return {4, 16, 32, padded <= 64 ? 4 : padded <= 192 ? 3 : 2, padded <= 64 ? 3 : padded <= 128 ? 2 : 1};
  if (padded > 128) return {8, 16, 64, padded <= 192 ? 3 : 2, 1};
  return {4, 32, 64, padded <= 64 ? 4 : 3, padded <= 64 ? 3 : 2};
}

// Byte offsets in shared memory.
struct AttendShared {
  int ring, walk, rows, steps, keys, bias, chosen, counts, bytes;  // the queries lie at 0
};

// Tiles of position_config are cut at multiples of the shape's rows in position, those of node_config at multiples in the node's
// sorted order; the grid has them for every batch row and head.
struct AttendConfig {
  int64_t tiles;       // of one batch row and head
  int64_t first_tile;  // first position tile that holds a row
  int64_t first_node, node_tiles;  // of the level: its first node that holds a row, tiles of its largest node
  int level;
  bool stored;        // rows may have met nodes before: out and lse hold what they have seen
  int query_blocks;   // query blocks that one tile may touch; 0 where it meets no lists of keys
  AttendShared shared;
};

// Query blocks of `block` rows that a tile of `rows` rows, cut at its multiples, may touch.
HA_INLINE constexpr int blocks_per_tile(int block, int rows) {
  if (rows % block == 0) return rows / block;
  if (block % rows == 0) return 1;
  return (rows + block - 2) / block + 1;
}

HA_INLINE constexpr AttendShared attend_shared(const AttendShape& shape, int row_bytes, int query_blocks, int num_blocks) {
  AttendShared s{};
  s.ring = shape.rows() * row_bytes;
  s.walk = s.ring + shape.buffers * shape.keys * row_bytes;
  s.rows = s.walk + kWalkBytes;
  s.steps = s.rows + shape.rows() * kRowInfoBytes;
  s.keys = s.steps + kStepRing * kStepBytes;
  s.bias = s.keys + (query_blocks ? kStepRing * shape.keys * 4 : 0);
  s.chosen = s.bias + kStepRing * query_blocks * shape.keys * 4;
  s.counts = s.chosen + query_blocks * num_blocks * 4;
  s.bytes = s.counts + query_blocks * 4;
  return s;
}

// Local part, sinks, and everything of `blocks` and of the exact path.
HA_INLINE AttendConfig position_config(const Geometry& g, const AttendShape& shape, int row_bytes) {
  AttendConfig c{};
  const Range tiles = g.tiles(shape.rows());
  c.first_tile = tiles.start;
  c.tiles = tiles.size();
  c.stored = has_nodes(g);
  c.query_blocks = g.exact() || g.sorts() ? 0 : blocks_per_tile(g.a.block_size, shape.rows());
  c.shared = attend_shared(shape, row_bytes, c.query_blocks, g.a.num_blocks);
  return c;
}

// One level of `sortlsh`.
HA_INLINE AttendConfig node_config(const Geometry& g, const AttendShape& shape, int row_bytes, int level) {
  AttendConfig c{};
  const Range nodes = g.nodes_of_level(level);
  c.level = level;
  c.first_node = nodes.start;
  c.node_tiles = ceil_div(g.a.causal ? min64(g.segment(level), g.seq_q) : g.seq_q, shape.rows());
  c.tiles = nodes.size() * c.node_tiles;
  c.stored = level > 0;
  c.query_blocks = blocks_per_tile(g.a.block_size, shape.rows());
  c.shared = attend_shared(shape, row_bytes, c.query_blocks, 2);
  return c;
}

}  // namespace ha
