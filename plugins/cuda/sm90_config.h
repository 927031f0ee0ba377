// Which problems the Hopper kernels take, how they are launched and in what order tiles are worked on: pure functions of shape and
// attributes, tested without a GPU.
#pragma once
#include "attend_config.h"

namespace ha {

constexpr int kHopperGroups = 2;       // warp groups that compute, of 64 rows each; one more loads
constexpr int kHopperRows = 64 * kHopperGroups;
constexpr int kHopperKeys = 128;       // of a step
constexpr int kTileColumns = 64, kTileKeys = 64;  // one load: 64 rows of 128 bytes
constexpr int kHopperLoaders = 128;    // threads that load
constexpr int kHopperThreads = kHopperLoaders + 128 * kHopperGroups;
// Registers of a thread: what the block has at the start, 168 each, goes from the group that loads to those that compute.
constexpr int kLoaderRegisters = 40, kWorkerRegisters = 232;
constexpr int kHopperSharedLimit = 227 * 1024;  // sm_90 grants this

// Whether the Hopper kernels take a problem: 16-bit elements and head sizes up to 128 on compute capability 9.0. Short blocks of the
// selector `blocks` would leave most of a warp group's 64 rows idle: they stay with the portable kernels.
inline bool uses_hopper(const Geometry& g, int32_t dtype, int compute_capability) {
  if (compute_capability != 90 || dtype == HA_FLOAT32) return false;
  if (max64(g.head_dim, g.head_dim_v) > 128 || g.seq_k == 0) return false;
  return g.exact() || g.sorts() || g.a.block_size >= 64 || g.a.num_blocks == 0;
}
constexpr int hopper_head(int64_t most) { return most <= 64 ? 64 : 128; }

// Keys or values of one step each pass through this many buffers.
HA_INLINE constexpr int hopper_buffers(int padded) { return padded <= 64 ? 8 : 5; }
// Steps whose description may still be read: those whose keys or values may be in a buffer, and the next.
HA_INLINE constexpr int hopper_steps(int padded) { return hopper_buffers(padded) / 2 + 2; }

// Byte offsets in shared memory. Queries lie at 0; tiles begin at multiples of 1024, as swizzled loads need it.
struct HopperShared {
  int ring, walk, rows, steps, keys, bias, chosen, counts, barriers, bytes;
};

HA_INLINE constexpr HopperShared hopper_shared(int padded, int query_blocks, int num_blocks) {
  const int row_bytes = padded * 2, steps = hopper_steps(padded);
  HopperShared s{};
  s.ring = kHopperRows * row_bytes;
  s.walk = s.ring + hopper_buffers(padded) * kHopperKeys * row_bytes;
  s.rows = s.walk + 2 * kWalkBytes;
  s.steps = s.rows + 2 * kHopperRows * kRowInfoBytes;
  s.keys = s.steps + steps * kStepBytes;
  s.bias = s.keys + (query_blocks ? steps * kHopperKeys * 4 : 0);
  s.chosen = s.bias + steps * query_blocks * kHopperKeys * 4;
  s.counts = s.chosen + 2 * query_blocks * num_blocks * 4;
  s.barriers = (s.counts + 2 * query_blocks * 4 + 7) / 8 * 8;
  s.bytes = s.barriers + (2 * hopper_buffers(padded) + 4) * 8;
  return s;
}

// The tiles of all batch rows and heads in the order they are worked on. Each block of threads takes one after the other, and the
// blocks' directions alternate, so that all get a like share of long and short tiles. Heads whose keys and values fit the cache
// together are worked on together.
struct HopperSchedule {
  int64_t tiles, slices, together, count;

  HA_INLINE int64_t at(int64_t block, int64_t blocks, int64_t turn) const {
    return turn * blocks + (turn % 2 ? blocks - 1 - block : block);
  }
  HA_INLINE void find(int64_t index, int64_t& slice, int64_t& tile) const {
    const int64_t group = index / (together * tiles), rest = index % (together * tiles);
    const int64_t width = min64(together, slices - group * together);
    slice = group * together + rest % width;
    tile = rest / width;
  }
};

inline HopperSchedule hopper_schedule(const Geometry& g, int64_t tiles) {
  constexpr int64_t kCacheBytes = 24 << 20;
  HopperSchedule s{tiles, g.batch * g.heads_q, 1, 0};
  const int64_t bytes = g.seq_k * (g.head_dim + g.head_dim_v) * 2;
  s.together = min64(max64(1, kCacheBytes / bytes) * g.group(), max64(s.slices, 1));
  s.count = s.tiles * s.slices;
  return s;
}

struct HopperConfig {
  AttendConfig attend;  // `shared` is not used
  HopperSchedule schedule;
  HopperShared shared;
};

constexpr AttendShape kHopperShape{kHopperGroups, 64, kHopperKeys, 0, 1};

inline HopperConfig hopper_config(const Geometry& g, const AttendConfig& attend, int padded, int num_blocks) {
  return {attend, hopper_schedule(g, attend.tiles), hopper_shared(padded, attend.query_blocks, num_blocks)};
}
// Local part, sinks, and everything of `blocks` and of the exact path.
inline HopperConfig hopper_position_config(const Geometry& g, int padded) {
  return hopper_config(g, position_config(g, kHopperShape, padded * 2), padded, g.a.num_blocks);
}
// One level of `sortlsh`.
inline HopperConfig hopper_node_config(const Geometry& g, int padded, int level) {
  return hopper_config(g, node_config(g, kHopperShape, padded * 2, level), padded, 2);
}

}  // namespace ha
