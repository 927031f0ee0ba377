// Which problems the Hopper kernels take, how they are launched and in what order tiles are worked on: pure functions of shape and
// attributes, tested without a GPU.
#pragma once
#include "attend_config.h"
#include "slice_order.h"

namespace ha {

constexpr int kGroupRows = 64;                    // query rows of a warp group that computes
constexpr int kTileColumns = 64, kTileKeys = 64;  // one load by the copy engine: 64 rows of 128 bytes
constexpr int kHopperSharedLimit = 227 * 1024;    // sm_90 grants this

// How one block of threads works: `groups` warp groups compute on steps of `keys` keys, which pass through `buffers` buffers, one for a
// step's keys and one for its values; steps are described in batches of `batch`, of which `held` are held. `planners` threads describe
// tiles and steps, `loaders` load them. They hand registers to the warp groups that compute. Each of these takes `pieces` pieces of 64
// query rows one after the other; `queries` tiles' queries are held. A buffer has `runs` runs of `keys` keys, of which a group takes its own.
struct HopperTable {
  int groups, keys, buffers, batch, planners, loaders, loader_registers, worker_registers, pieces = 1, queries = 1, runs = 1, held = 2;
  HA_INLINE constexpr int rows() const { return groups * pieces * kGroupRows; }
  HA_INLINE constexpr int buffer_rows() const { return keys * runs; }
  HA_INLINE constexpr int threads() const { return groups * 128 + planners + loaders; }
  HA_INLINE constexpr int steps() const { return held * batch; }
};
HA_INLINE constexpr HopperTable hopper_table(int padded) { return {2, 128, padded <= 64 ? 8 : 5, 4, 128, 128, 40, 216}; }
// The same for nodes: their tiles have a few steps only, whose gathered keys serve 256 rows. Above 64, registers suffice for two pieces
// where a step has 64 keys, and shared memory for one tile's queries.
HA_INLINE constexpr HopperTable node_table(int padded) {
  return padded <= 64 ? HopperTable{2, 128, 8, 4, 128, 128, 40, 216, 2, 2} : HopperTable{2, 64, 8, 8, 128, 128, 40, 216, 2, 1};
}
// The same for what the plan of `blocks` names, in a launch of its own: each group has a key block of its own in every buffer. Up to 64 a
// tile is computed about as fast as it is planned: the next one is described as a whole meanwhile.
HA_INLINE constexpr HopperTable pair_table(int padded) {
  return padded <= 64 ? HopperTable{2, 64, 10, 8, 128, 128, 72, 184, 1, 2, 2, 4} : HopperTable{2, 64, 4, 8, 128, 128, 72, 184, 1, 2, 2};
}

// The same where a tile meets runs of consecutive keys alone: nothing is listed, so that one warp plans and loads. Two tiles' queries are
// held.
struct RunTable {
  int groups, keys, buffers, loader_registers, worker_registers;
  HA_INLINE constexpr int rows() const { return groups * kGroupRows; }
  HA_INLINE constexpr int threads() const { return groups * 128 + 128; }
};
HA_INLINE constexpr RunTable run_table(int padded) { return padded <= 64 ? RunTable{3, 128, 9, 32, 160} : RunTable{2, 128, 5, 24, 240}; }

// Whether the Hopper kernels take a problem: 16-bit elements and head sizes up to 128 on compute capability 9.0. Query blocks shorter
// than a warp group's rows would leave most of them idle at each list of keys: they stay with the portable kernels.
inline bool uses_hopper(const Geometry& g, int32_t dtype, int compute_capability) {
  if (compute_capability != 90 || dtype == HA_FLOAT32) return false;
  if (max64(g.head_dim, g.head_dim_v) > 128 || g.seq_k == 0) return false;
  return g.exact() || g.a.block_size >= kGroupRows || (!g.sorts() && g.a.num_blocks + g.a.sample_size == 0);
}
// Whether its positions meet runs of keys alone: the exact path, and what nodes of `sortlsh` leave.
inline bool meets_runs(const Geometry& g) { return g.exact() || g.sorts() || g.a.num_blocks + g.a.sample_size == 0; }
constexpr int hopper_head(int64_t most) { return most <= 64 ? 64 : 128; }

constexpr int kDigestBytes = 16;

// Byte offsets in shared memory. Queries lie at 0; tiles begin at multiples of 1024, as swizzled loads need it.
struct HopperShared {
  int ring, walk, rows, steps, digests, keys, bias, chosen, counts, barriers, bytes;
};

HA_INLINE constexpr HopperShared hopper_shared(const HopperTable& t, int padded, int query_blocks, int num_blocks) {
  const int row_bytes = padded * 2, list = query_blocks ? t.steps() * t.keys * 4 : 0;
  HopperShared s{};
  s.ring = t.queries * t.rows() * row_bytes;
  s.walk = s.ring + t.buffers * t.buffer_rows() * row_bytes;
  s.rows = s.walk + 3 * kWalkBytes;  // of two tiles, and of the one that is planned
  s.steps = s.rows + 2 * t.rows() * kRowInfoBytes;
  s.digests = s.steps + t.steps() * kStepBytes;
  s.keys = s.digests + t.steps() * kDigestBytes;
  s.bias = s.keys + list;
  s.chosen = s.bias + query_blocks * list;
  s.counts = s.chosen + 2 * query_blocks * num_blocks * 4;
  s.barriers = (s.counts + 2 * query_blocks * 4 + 7) / 8 * 8;
  s.bytes = s.barriers + (2 * t.buffers + 2 * t.queries + 4 + 2 * t.held) * 8;
  return s;
}

constexpr int kRunTileBytes = 160;

// The same for runs of keys: two tiles' queries, the ring, from here on the barriers, and two tiles' descriptions.
HA_INLINE constexpr int runs_barriers(int padded) {
  const RunTable t = run_table(padded);
  return (2 * t.rows() + t.buffers * t.keys) * padded * 2;
}
HA_INLINE constexpr int runs_tiles(int padded) { return runs_barriers(padded) + (2 * run_table(padded).buffers + 4) * 8; }
HA_INLINE constexpr int runs_bytes(int padded) { return runs_tiles(padded) + 2 * kRunTileBytes; }
static_assert(runs_tiles(64) % 16 == 0 && runs_tiles(128) % 16 == 0);  // where RunTile may lie
static_assert(runs_bytes(64) <= kHopperSharedLimit && runs_bytes(128) <= kHopperSharedLimit);

// Query blocks of 64 rows and more: a tile of 128 rows touches three at most, one of 256 five.
static_assert(hopper_shared(hopper_table(64), 64, 3, 64).bytes <= kHopperSharedLimit);
static_assert(hopper_shared(hopper_table(128), 128, 3, 64).bytes <= kHopperSharedLimit);
static_assert(hopper_shared(pair_table(64), 64, 2, 64).bytes <= kHopperSharedLimit);
static_assert(hopper_shared(pair_table(128), 128, 2, 64).bytes <= kHopperSharedLimit);
static_assert(hopper_shared(node_table(64), 64, 5, 2).bytes <= kHopperSharedLimit);
static_assert(hopper_shared(node_table(128), 128, 5, 2).bytes <= kHopperSharedLimit);

// Each block of threads takes one tile after the other, and the blocks' directions alternate, so that all get a like share of long and
// short tiles.
struct HopperSchedule : SliceOrder {
  int64_t count;

  HA_INLINE int64_t at(int64_t block, int64_t blocks, int64_t turn) const {
    return turn * blocks + (turn % 2 ? blocks - 1 - block : block);
  }
  // Tiles of nodes are alike: block `block` takes its share of all tiles, slice by slice, from this one to where the next block's begins.
  // Most of a share's neighbours belong to one node.
  HA_INLINE int64_t share(int64_t block, int64_t blocks) const { return block * count / blocks; }
};

inline HopperSchedule hopper_schedule(const Geometry& g, int64_t tiles, bool steady = false,
                                      int64_t cache_bytes = kMostCacheBytes) {
  return {slice_order(g, tiles, g.seq_k * (g.head_dim + g.head_dim_v) * 2, cache_bytes, steady), tiles * g.batch * g.heads_q};
}

struct HopperConfig {
  AttendConfig attend;  // `shared` is not used
  HopperSchedule schedule;
  HopperShared shared;
};

HA_INLINE constexpr AttendShape hopper_shape(const HopperTable& t) { return {t.groups * t.pieces, kGroupRows, t.keys, t.buffers, 1}; }
inline HopperConfig hopper_config(const Geometry& g, const AttendConfig& attend, const HopperTable& t, int padded, int num_blocks) {
  return {attend, hopper_schedule(g, attend.tiles), hopper_shared(t, padded, attend.query_blocks, num_blocks)};
}
// Everything of `blocks`, where it takes one launch.
inline HopperConfig hopper_position_config(const Geometry& g, int padded) {
  const HopperTable t = hopper_table(padded);
  return hopper_config(g, position_config(g, hopper_shape(t), padded * 2), t, padded, g.a.num_blocks);
}
// What the plan of `blocks` names, where local part and sinks have a launch of their own. Tiles whose rows see these alone are left out.
inline HopperConfig hopper_pair_config(const Geometry& g, int padded) {
  const HopperTable t = pair_table(padded);
  HopperConfig config = hopper_config(g, position_config(g, hopper_shape(t), padded * 2), t, padded, g.a.num_blocks);
  AttendConfig& attend = config.attend;
  const int64_t first = (g.a.local_overlap + g.a.sinks / g.a.local_size + 1) * int64_t{g.a.local_size}, stop = g.first() + g.seq_q;
  const int64_t last_tile = attend.first_tile + attend.tiles - 1;
  attend.first_tile = max64(attend.first_tile, first / t.rows());
  attend.tiles = first < stop ? last_tile - attend.first_tile + 1 : 0;
  config.schedule = hopper_schedule(g, attend.tiles);
  return config;
}
// Where positions meet runs alone, or all else that they meet has had launches of its own. The more heads are together, the more alike are
// the shares that blocks of threads get of tiles that differ in length; but keys that the cache does not hold come from DRAM, which takes
// power, and at its power limit the chip slows down.
inline HopperConfig hopper_runs_config(const Geometry& g, int padded) {
  constexpr int64_t kCacheBytes = 32 << 20;
  const RunTable t = run_table(padded);
  AttendConfig attend = position_config(g, {t.groups, kGroupRows, t.keys, t.buffers, 1}, padded * 2);
  attend.stored |= splits_blocks(g);
  HopperShared shared{};
  shared.bytes = runs_bytes(padded);
  return {attend, hopper_schedule(g, attend.tiles, g.a.causal != 0, kCacheBytes), shared};
}
// One level of `sortlsh`.
inline HopperConfig hopper_node_config(const Geometry& g, int padded, int level) {
  const HopperTable t = node_table(padded);
  return hopper_config(g, node_config(g, hopper_shape(t), padded * 2, level), t, padded, 2);
}

}  // namespace ha
