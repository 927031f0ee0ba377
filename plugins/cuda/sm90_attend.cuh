// Attention on Hopper: one block of threads an SM works through many tiles of query rows. Some warps plan, some load, warp groups compute
// (sm90_planner.cuh, sm90_loader.cuh, sm90_worker.cuh); the walks over a tile's keys are those of the portable kernels.
#pragma once
#include "launch.cuh"
#include "sm90_kernels.h"
#include "sm90_loader.cuh"
#include "sm90_node_planner.cuh"
#include "sm90_node_walk.cuh"
#include "sm90_node_worker.cuh"
#include "sm90_pair_walk.cuh"
#include "sm90_pair_worker.cuh"
#include "sm90_planner.cuh"
#include "sm90_runs_loader.cuh"
#include "sm90_runs_worker.cuh"
#include "sm90_tile_map.h"
#include "sm90_worker.cuh"
#include "walk_nodes.cuh"
#include "walk_positions.cuh"

namespace ha {

// Once the barriers of a block of threads are initialised by its first thread, all may use them.
template <class Block>
HA_DEVICE void start_block(const Block& block, const HopperArgs& args) {
  if (thread_index() == 0) {
    block.init_barriers();
    prefetch_map(args.queries);
    prefetch_map(args.keys);
    prefetch_map(args.values);
  }
  sync_block();
}

// Calls body(turn, index) for the tiles of this block of threads, in the order of the schedule.
template <class Body>
HA_DEVICE void each_turn(const HopperSchedule& schedule, Body&& body) {
  for (int turn = 0; turn * grid_size() < schedule.count; ++turn) {
    const int64_t index = schedule.at(block_index(), grid_size(), turn);
    if (index >= schedule.count) break;
    body(turn, index);
  }
}

// Calls body(turn, slice, tile) for the same.
template <class Body>
HA_DEVICE void each_tile(const HopperSchedule& schedule, Body&& body) {
  each_turn(schedule, [&](int turn, int64_t index) {
    int64_t slice, tile;
    schedule.find(index, slice, tile);
    body(turn, slice, tile);
  });
}

// The same for nodes.
template <class Body>
HA_DEVICE void each_neighbour(const HopperSchedule& schedule, Body&& body) {
  const int64_t start = schedule.share(block_index(), grid_size()), count = schedule.share(block_index() + 1, grid_size()) - start;
  int64_t slice = start / schedule.tiles, tile = start % schedule.tiles;
  for (int turn = 0; turn < int(count); ++turn) {
    body(turn, slice, tile);
    if (++tile == schedule.tiles) tile = 0, ++slice;
  }
}

template <class T, int P, class Walk>
using PlannerOf = std::conditional_t<Walk::kConsecutive, Planner<T, P, Walk>, NodePlanner<T, P, Walk>>;
template <class T, int P, class Walk>
using WorkerOf = std::conditional_t<!Walk::kConsecutive, NodeWorker<T, P, Walk>,
                                    std::conditional_t<Walk::Shape::kOwnedPairs, Worker<T, P, Walk>, PairWorker<T, P, Walk>>>;

template <class T, int P, class Walk>
HA_KERNEL((Walk::Shape::kTable.threads()), 1) hopper_kernel(const HA_CONSTANT HopperArgs args) {
  using Block = HopperBlock<T, P, Walk>;
  const Geometry g(args.p);
  const HopperSchedule& schedule = args.config.schedule;
  unsigned char* const shared = shared_memory();
  const Block block{args, shared, shared_address(shared)};
  start_block(block, args);
  constexpr HopperTable kTable = Block::kTable;
  const auto each = [&](auto&& body) {
    if constexpr (Walk::kConsecutive) each_tile(schedule, body);
    else each_neighbour(schedule, body);
  };
  // Those that compute come first: warp groups begin at multiples of 128 threads.
  const int group = int(uniform(thread_index() / 128));
  if (group < kTable.groups) {
    take_registers<kTable.worker_registers>();
    WorkerOf<T, P, Walk> worker{{block, thread_index() % 128}, g, group};
    worker.start();
    each([&](int turn, int64_t slice, int64_t) { worker.run(turn, slice); });
    return;
  }
  give_registers<kTable.loader_registers>();
  const int thread = thread_index() - kTable.groups * 128;
  if (thread < kTable.planners) {
    PlannerOf<T, P, Walk> planner{block, g, thread};
    each([&](int turn, int64_t slice, int64_t tile) { planner.run(turn, slice, tile); });
  } else {
    Loader<T, P, Walk> loader{block, g, thread - kTable.planners};
    each([&](int turn, int64_t slice, int64_t) { loader.run(turn, slice); });
    loader.finish();
  }
}

// The same for runs of keys alone.
template <class T, int P>
HA_KERNEL((run_table(P).threads()), 1) hopper_runs_kernel(const HA_CONSTANT HopperArgs args) {
  constexpr RunTable kTable = run_table(P);
  const Geometry g(args.p);
  const HopperSchedule& schedule = args.config.schedule;
  unsigned char* const shared = shared_memory();
  const RunBlock<P> block{shared, shared_address(shared)};
  start_block(block, args);
  const int group = int(uniform(thread_index() / 128));
  if (group < kTable.groups) {
    take_registers<kTable.worker_registers>();
    RunWorker<T, P> worker{block, args, g, group, thread_index() % 128};
    worker.start();
    each_turn(schedule, [&](int turn, int64_t) { worker.run(turn); });
  } else {
    give_registers<kTable.loader_registers>();  // by all of a warp group, of which one warp has a duty
    const int lane = thread_index() - kTable.groups * 128;
    if (lane < 32) {
      RunLoader<T, P> loader{block, args, g, lane};
      each_tile(schedule, [&](int turn, int64_t slice, int64_t tile) { loader.run(turn, int(slice), int(tile)); });
    }
  }
}

template <class T, int P>
void launch_hopper(const AttendArgs& args) {
  const Geometry g(args.p);
  constexpr int64_t kMostSlices = INT32_MAX;  // the copy engine's coordinates are int
  if (g.batch * g.heads_q > kMostSlices)
    throw Error(HA_UNSUPPORTED, "batch x heads is " + std::to_string(g.batch * g.heads_q) + "; the CUDA kernels take up to " +
                                    std::to_string(kMostSlices) + ": split the batch");
  HopperArgs hopper{args.p, args.lse, {}, {}, {}, {}};
  hopper.queries = tile_map(args.p.q, args.p.dtype, g.batch * g.heads_q, g.seq_q, g.head_dim);
  hopper.keys = tile_map(args.p.k, args.p.dtype, g.batch * g.heads_kv, g.seq_k, g.head_dim);
  hopper.values = tile_map(args.p.v, args.p.dtype, g.batch * g.heads_kv, g.seq_k, g.head_dim_v);
  const int64_t processors = processor_count();
  const auto run = [&](auto walk, const HopperConfig& config) {
    using Walk = decltype(walk);
    hopper.config = config;
    const int64_t blocks = min64(config.schedule.count, processors);
    launch<hopper_kernel<T, P, Walk>>(blocks, Walk::Shape::kTable.threads(), size_t(config.shared.bytes), args.p.stream, hopper);
  };
  using Nodes = TallNodeWalk<HopperShape<P, Tiles::kNodes>>;
  if (has_nodes(g))
    for (int level = 0; level < g.levels(); ++level) run(Nodes{}, hopper_node_config(g, P, level));
  // Nodes of a problem that is not causal hold every row: without sinks nothing is left.
  if (has_nodes(g) && !g.a.causal && !g.a.sinks) return;
  if (splits_blocks(g)) run(PairWalk<HopperShape<P, Tiles::kPairs>>{}, hopper_pair_config(g, P));
  else if (!meets_runs(g)) return run(PositionWalk<HopperShape<P>>{}, hopper_position_config(g, P));
  hopper.config = hopper_runs_config(g, P);
  const int64_t blocks = min64(hopper.config.schedule.count, processors);
  launch<hopper_runs_kernel<T, P>>(blocks, run_table(P).threads(), size_t(hopper.config.shared.bytes), args.p.stream, hopper);
}

}  // namespace ha
