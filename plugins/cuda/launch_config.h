// How each kernel is launched and where its scratch lies: pure functions of shape and attributes, tested without a GPU.
#pragma once
#include "select_config.h"
#include "sort_config.h"

namespace ha {

// Head sizes, of values too: rows are read in pieces of 16 bytes.
constexpr int kHeadStep = 8, kHeadMost = 256;
// Positions, and the ends of tiles and blocks beyond the last one, are int in the kernels.
constexpr int64_t kMostRows = int64_t{1} << 30;

constexpr int kSplitBlock = 64;  // block_size where `blocks` takes two launches on Hopper

// Nodes contribute to the output; otherwise they need no plan.
HA_INLINE bool has_nodes(const Geometry& g) { return !g.exact() && g.sorts() && (g.a.num_blocks || g.a.sample_size) && g.node_count(); }

// Attention of `blocks` takes two launches: what the plan names, then local part and sinks, which add what the first has seen.
HA_INLINE bool splits_blocks(const Geometry& g) {
  return !g.exact() && !g.sorts() && g.a.causal && g.a.block_size == kSplitBlock && g.a.num_blocks > 0;
}

// --- scratch --------------------------------------------------------------------------------------------------------

// Byte offsets in the workspace. `blocks`: pools and the plan. `sortlsh`: ranks, the chunks' counts or, where ranks have two
// digits, a first pass' order, the plan. Of both what rows have seen between launches where the caller wants no LSE.
struct Workspace {
  size_t q_fine, q_fine_scale, q_coarse, q_coarse_scale, k_fine, k_fine_scale, k_coarse, k_coarse_scale;
  size_t q_ranks, k_ranks, counts, least, order, lse;
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
    w.least = take(least_sums(g) * 4);
    w.order = take(g.a.num_projections > kSortDigitBits ? g.plan_size() * 4 : 0);
    w.lse = take(g.batch * g.heads_q * g.seq_q * 4);
  } else if (g.a.num_blocks) {
    const auto pools = [&](int64_t heads, int64_t count, size_t& values, size_t& scales) {
      values = take(g.batch * heads * count * pool_stride(g.head_dim));
      scales = take(g.batch * heads * count * 4);
    };
    pools(g.heads_q, g.query_pools(g.a.pool_size).size(), w.q_fine, w.q_fine_scale);
    pools(g.heads_kv, g.key_pools(g.a.pool_size), w.k_fine, w.k_fine_scale);
    if (select_config(g).supers) {
      pools(g.heads_q, g.query_pools(kCoarsePool).size(), w.q_coarse, w.q_coarse_scale);
      pools(g.heads_kv, g.key_pools(kCoarsePool), w.k_coarse, w.k_coarse_scale);
    }
  }
  if (splits_blocks(g)) w.lse = take(g.batch * g.heads_q * g.seq_q * 4);
  w.plan = take(g.plan_size() * 4);
  return w;
}

}  // namespace ha
