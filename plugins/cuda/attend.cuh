// Attention of one tile of query rows over all its keys in one pass: online softmax in registers, tensor-core products. Every half
// step (keys, then values) ends one barrier. The exact path is the same walk over one range; `sortlsh` runs one launch a level of its
// tree, then one for local part and sinks, and merges through out and lse.
#pragma once
#include "attend_tile.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "walk_nodes.cuh"
#include "walk_positions.cuh"

namespace ha {

template <class T, int P, class Walk>
HA_KERNEL((attend_shape(int(sizeof(T)), P).threads()), (attend_shape(int(sizeof(T)), P).blocks_per_sm))
attend_kernel(const HA_CONSTANT TileArgs args) {
  using Tile = AttendTile<T, P, Walk>;
  using S = Shape<T, P>;
  static_assert(sizeof(Walk) <= kWalkBytes);
  // Blocks of 17 rows are the most that a tile can touch, 64 key blocks the most that one of them takes.
  static_assert(attend_shared(S::kShape, S::kRowBytes, blocks_per_tile(17, S::kTileRows), 64).bytes <= kAttendSharedLimit);
  const Geometry g(args.p);
  const AttendConfig& config = args.config;
  const int64_t tile_index = block_index() % config.tiles, slice = block_index() / config.tiles;
  const int64_t batch = slice / g.heads_q, head = slice % g.heads_q, kv_slice = batch * g.heads_kv + head / g.group();
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  if constexpr (!Walk::kConsecutive) {
    if (!Walk::present(args.p, config, g, tile_index, batch)) return;
  }

  unsigned char* const shared = shared_memory();
  Walk& walk = *reinterpret_cast<Walk*>(shared + config.shared.walk);
  const int k_row = int(g.head_dim * int64_t{sizeof(T)}), v_row = int(g.head_dim_v * int64_t{sizeof(T)});
  Tile tile{args,
            walk,
            static_cast<const char*>(args.p.k) + kv_slice * g.seq_k * k_row,
            static_cast<const char*>(args.p.v) + kv_slice * g.seq_k * v_row,
            shared,
            shared_address(shared),
            k_row,
            v_row,
            0,
            int(g.length(args.p.lengths, batch)),
            base2_factor(g)};
  const char* const q = static_cast<const char*>(args.p.q) + slice * g.seq_q * k_row;
  if constexpr (Walk::kConsecutive) tile.load_queries(q, [&](int row) { return Walk::row_index(config, g, tile_index, row); });
  if (thread_index() == 0) {
    walk.chosen = reinterpret_cast<int32_t*>(shared + config.shared.chosen);
    walk.counts = reinterpret_cast<int32_t*>(shared + config.shared.counts);
    walk.start(args.p, config, g, tile_index, batch, head);
  }
  sync_block();
  static_assert(S::kThreads >= S::kTileRows);
  if (thread_index() < S::kTileRows) tile.row_at(thread_index()) = walk.row(g, thread_index());
  for (int query_block = warp; query_block < config.query_blocks; query_block += S::kWarps)
    walk.read_plan(args.p, g, slice, query_block, lane);
  sync_block();
  if constexpr (!Walk::kConsecutive) tile.load_queries(q, [&](int row) { return tile.row_at(row).index; });
  if (thread_index() == 0) walk.plan_steps(g);
  sync_block();

  tile.total = walk.total;
  for (int j = 0; j < 3; ++j) tile.describe(j);
  sync_block();
  for (int j = 0; j < 2; ++j) tile.list(j);
  sync_block();
  for (int h = 0; h < Tile::kBuffers - 1; ++h) tile.load(h);

  WarpState<T, P> state;
  state.clear();
  if (config.stored) tile.load_state(state, slice, warp, lane);
  for (int j = 0; j < tile.total; ++j) {
    // Here, where no logits and probabilities fill the registers.
    tile.describe(j + 3);
    tile.list(j + 2);
    copy_wait<Tile::kBuffers - 2>();
    sync_block();
    if (Walk::kConsecutive && S::kPairs && tile.step_at(j)->part == Part::kPair)
      tile.template run_step<(Walk::kConsecutive && S::kPairs ? S::kKeys / 2 : S::kKeys)>(state, j, warp, lane);
    else
      tile.template run_step<S::kKeys>(state, j, warp, lane);
  }
  copy_wait<0>();
  sync_block();
  tile.store(state, slice, warp, lane);
}

template <class T, int P>
void launch_attend(const AttendArgs& args) {
  using S = Shape<T, P>;
  const Geometry g(args.p);
  const int64_t slices = g.batch * g.heads_q;
  const auto run = [&](auto walk, const AttendConfig& config) {
    using Walk = decltype(walk);
    launch<attend_kernel<T, P, Walk>>(slices * config.tiles, S::kThreads, size_t(config.shared.bytes), args.p.stream,
                                      TileArgs{args.p, args.lse, config});
  };
  if (has_nodes(g))
    for (int level = 0; level < g.levels(); ++level) run(NodeWalk<S>{}, node_config(g, S::kShape, S::kRowBytes, level));
  // Nodes of a problem that is not causal hold every row: without sinks nothing is left.
  if (!has_nodes(g) || g.a.causal || g.a.sinks) run(PositionWalk<S>{}, position_config(g, S::kShape, S::kRowBytes));
}

}  // namespace ha
