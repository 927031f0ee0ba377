// The order in which blocks of threads work on the tiles of all slices (batch rows and heads).
#pragma once
#include "geometry.h"

namespace ha {

// Heads whose keys fit the cache together are worked on together: first the first tile of each of them, then the second one. Where tiles'
// lengths fall steadily, every other group of heads is taken from its last tile on, so that neighbours in the order stay alike, and
// the very last are short.
struct SliceOrder {
  int64_t tiles, slices, together;
  bool steady;

  HA_INLINE void find(int64_t index, int64_t& slice, int64_t& tile) const {
    if (slices * tiles >> 32) find_as<uint64_t>(index, slice, tile);
    else find_as<uint32_t>(index, slice, tile);  // a GPU divides 64 bits by some hundred instructions
  }

 private:
  template <class Number>
  HA_INLINE void find_as(int64_t index, int64_t& slice, int64_t& tile) const {
    const Number most = Number(together), size = most * Number(tiles), group = Number(index) / size, rest = Number(index) - group * size;
    const Number left = Number(slices) - group * most, width = left < most ? left : most, at = rest / width;
    slice = int64_t(group * most + (rest - at * width));
    tile = int64_t(at);
    if (steady && ((Number(slices) - 1) / most - group) % 2) tile = tiles - 1 - tile;
  }
};

constexpr int64_t kMostCacheBytes = 24 << 20;

// `bytes`: what is read of a key head again and again, of which `cache_bytes` stay in the cache.
inline SliceOrder slice_order(const Geometry& g, int64_t tiles, int64_t bytes, int64_t cache_bytes = kMostCacheBytes, bool steady = false) {
  const int64_t heads = max64(g.batch * g.heads_kv, 1);
  const int64_t most = min64(max64(cache_bytes / max64(bytes, 1), 1), heads);
  return {tiles, g.batch * g.heads_q, ceil_div(heads, ceil_div(heads, most)) * g.group(), steady};
}

}  // namespace ha
