// How each kernel is launched and where its scratch lies: pure functions of shape and attributes, tested without a GPU.
#pragma once
#include "sort_config.h"

namespace ha {

// Head sizes, of values too: rows are read in pieces of 16 bytes.
constexpr int kHeadStep = 8, kHeadMost = 256;
// Positions, and the ends of tiles and blocks beyond the last one, are int in the kernels.
constexpr int64_t kMostRows = int64_t{1} << 30;

// --- selection ------------------------------------------------------------------------------------------------------

// Bytes from one quantised pool to the next, X(bytes): the head size filled up to whole tensor-core operands.
#define HA_POOL_STRIDES(X) X(64) X(128) X(192) X(256)
HA_INLINE int64_t pool_stride(int64_t head_dim) { return ceil_div(head_dim, 64) * 64; }

constexpr int kSelectThreads = 128;
constexpr int kSelectMostBlocks = 4;
constexpr int kSelectBlockBytes = 128;  // what is known of each query block
constexpr int kSelectShared = 96 * 1024;    // wanted at most: every GPU of sm_80 and later grants this
constexpr int kSelectMostShared = 227 * 1024;  // taken at most: sm_90 grants this

struct SelectConfig {
  int blocks;                             // neighbouring query blocks of one block of threads: 1, 2 or 4
  int64_t first, groups;                  // groups of `blocks` query blocks, cut at multiples, that hold a row
  int64_t supers, kept, entries, bytes;   // most superblocks scored, kept, and key blocks scored for one query block
  bool fits() const { return bytes <= kSelectMostShared; }
};

inline SelectConfig select_config(const Geometry& g) {
  SelectConfig c{};
  const Range tiles = g.query_blocks();
  // Candidates grow with the position and with the length, so the last query block of a full row has the most.
  const Range most = g.candidates((tiles.stop - 1) * g.a.block_size, g.seq_k);
  c.entries = most.size();
  if (g.may_use_superblocks() && most.size()) {
    const int64_t supers = g.superblocks(most).size(), per = kSuperblock / g.a.block_size;
    c.supers = supers > kKeptMin ? supers : 0;
    c.kept = c.supers ? Geometry::kept_superblocks(supers) : 0;
    // Query blocks with fewer candidates score all of them, at most kKeptMin superblocks.
    c.entries = c.supers ? c.kept * per : c.entries;
  }
  const int widest = g.may_use_superblocks() ? kSuperblock / g.a.block_size : 1;
  c.blocks = widest < kSelectMostBlocks ? widest : kSelectMostBlocks;
  const auto bytes = [&c] { return kSelectBlockBytes + c.blocks * (c.supers + c.kept + c.entries) * 4; };
  while (c.blocks > 1 && bytes() > kSelectShared) c.blocks /= 2;
  c.bytes = bytes();
  c.first = floor_div(tiles.start, c.blocks);
  c.groups = tiles.size() ? floor_div(tiles.stop - 1, c.blocks) - c.first + 1 : 0;
  return c;
}

// Nodes contribute to the output; otherwise they need no plan.
HA_INLINE bool has_nodes(const Geometry& g) { return !g.exact() && g.sorts() && (g.a.num_blocks || g.a.sample_size) && g.node_count(); }

// --- scratch --------------------------------------------------------------------------------------------------------

// Byte offsets in the workspace. `blocks`: pools and the plan. `sortlsh`: ranks, the chunks' counts or, where ranks have two
// digits, a first pass' order, the plan, and what rows have seen between launches where the caller wants no LSE.
struct Workspace {
  size_t q_fine, q_fine_scale, q_coarse, q_coarse_scale, k_fine, k_fine_scale, k_coarse, k_coarse_scale;
  size_t q_ranks, k_ranks, counts, order, lse;
  size_t plan, bytes;
};

inline Workspace workspace(const Geometry& g) {
  Workspace w{};
  if (g.exact()) return w;
  const auto take = [&w](int64_t bytes) {
    const size_t start = w.bytes;
    w.bytes += (size_t(bytes) + 255) / 256 * 256;
    return start;
  };
  if (g.sorts()) {
    w.q_ranks = take(g.batch * g.heads_q * g.seq_q * 2);
    w.k_ranks = take(g.batch * g.heads_kv * g.seq_k * 2);
    w.counts = take(chunk_counts(g) * 4);
    w.order = take(g.a.num_projections > kSortDigitBits ? g.plan_size() * 4 : 0);
    w.lse = take(g.batch * g.heads_q * g.seq_q * 4);
  } else if (g.a.num_blocks) {
    const auto pools = [&](int64_t heads, int64_t count, size_t& values, size_t& scales) {
      values = take(g.batch * heads * count * pool_stride(g.head_dim));
      scales = take(g.batch * heads * count * 4);
    };
    pools(g.heads_q, g.query_pools(g.a.pool_size), w.q_fine, w.q_fine_scale);
    pools(g.heads_kv, g.key_pools(g.a.pool_size), w.k_fine, w.k_fine_scale);
    if (select_config(g).supers) {
      pools(g.heads_q, g.query_pools(kCoarsePool), w.q_coarse, w.q_coarse_scale);
      pools(g.heads_kv, g.key_pools(kCoarsePool), w.k_coarse, w.k_coarse_scale);
    }
  }
  w.plan = take(g.plan_size() * 4);
  return w;
}

}  // namespace ha
