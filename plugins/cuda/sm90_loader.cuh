// The warp group that loads: it walks over each tile's steps ahead of the groups that compute, describes them, and fills the buffers. Runs
// of keys are tiles of the copy engine, rows that the plan lists are gathered by cp.async.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct Loader {
  using Block = HopperBlock<T, P, Walk>;
  static constexpr int kChunks = P / 8, kRowsPerPass = kHopperLoaders / kChunks;
  static_assert(kRowsPerPass % 8 == 0);

  Block& block;
  const Geometry& g;
  int thread;
  int buffer = 0, phase = 0;  // of the ring: the next buffer, and how often it has gone round

  HA_DEVICE void sync() const { sync_named(1, kHopperLoaders); }

  // Tile number `turn` of this block of threads.
  HA_DEVICE void run(int64_t turn, int64_t slice, int64_t tile) {
    const HopperArgs& args = block.args;
    const AttendConfig& config = args.config.attend;
    const int64_t batch = slice / g.heads_q, head = slice % g.heads_q, kv_slice = batch * g.heads_kv + head / g.group();
    const int parity = int(turn & 1), again = int(turn >> 1 & 1);
    Walk& walk = block.walk(parity);

    barrier_wait(block.tile_done(parity), again ^ 1);  // the tile before the last one has left its description
    bool present = true;
    if constexpr (!Walk::kConsecutive) present = Walk::present(args.p, config, g, tile, batch);
    if (thread == 0 && present) {
      walk.chosen = block.chosen(parity);
      walk.counts = block.counts(parity);
      walk.start(args.p, config, g, tile, batch, head);
    }
    sync();
    if (present) {
      block.row(parity, thread) = walk.row(g, thread);
      if (thread < config.query_blocks) walk.read_plan(args.p, g, slice, thread);
    }
    sync();
    if (thread == 0) {
      if (present) walk.plan_steps(g);
      else walk.total = -1;
    }
    barrier_wait(block.queries_free(), (int(turn) & 1) ^ 1);
    sync();
    if (present) load_queries(walk, slice, parity);
    else if (thread == 0) barrier_arrive(block.queries_ready(), Block::kFills);

    const int length = int(g.length(args.p.lengths, batch)), total = walk.total;
    const float factor = block.factor(g);
    for (int j = 0; j < total; ++j) {
      if (thread < kHopperGroups) write_step(walk, j, thread, block.step());
      sync();
      const Step step = *block.step();
      if (!Walk::kConsecutive || step.listed()) {
        walk.write_entry(step, thread, 0, 1, factor, block.list_keys(), block.list_bias());
        sync();
      }
      load(step, args.keys, args.p.k, g.head_dim, kv_slice, length);
      load(step, args.values, args.p.v, g.head_dim_v, kv_slice, length);
      block.next_step();
    }
  }

 private:
  HA_DEVICE void load_queries(const Walk& walk, int64_t slice, int parity) const {
    const HopperArgs& args = block.args;
    if constexpr (Walk::kConsecutive) {
      if (thread != 0) return;
      barrier_expect(block.queries_ready(), kHopperRows * P * 2);
#pragma unroll
      for (int column = 0; column < P / 64; ++column)
#pragma unroll
        for (int row = 0; row < kHopperRows; row += kTileKeys)
          load_tile(args.queries, block.queries() + column * kHopperRows * 128 + row * 128, block.queries_ready(), column * 64,
                    walk.first - walk.row0 + row, int(slice));
      barrier_arrive(block.queries_ready(), Block::kFills);
    } else {
      const int row_bytes = int(g.head_dim) * 2;
      const char* const source = static_cast<const char*>(args.p.q) + slice * g.seq_q * row_bytes;
      gather(block.queries(), source, row_bytes, [&](int row) { return block.row(parity, row).index; });
      Block::arrive_gathered(block.queries_ready(), thread);
    }
  }

  // Fills the next buffer with a step's keys or values. Keys past the length are zeros (rule 2).
  HA_DEVICE void load(const Step& step, const TileMap& map, const void* base, int64_t head_dim, int64_t kv_slice, int length) {
    const uint32_t full = block.full(buffer), target = block.buffer(buffer);
    barrier_wait(block.free(buffer), phase ^ 1);
    const int row_bytes = int(head_dim) * 2;
    const char* const source = static_cast<const char*>(base) + kv_slice * g.seq_k * row_bytes;
    // A half that is not there is masked; its values have to be numbers all the same.
    const int lower = step.lower >= 0 ? step.lower : max(step.upper, 0), upper = step.upper >= 0 ? step.upper : lower;
    if (!Block::gathers(step, length, int(g.seq_k))) {
      if (thread == 0) {
        barrier_expect(full, kHopperKeys * P * 2);
#pragma unroll
        for (int column = 0; column < P / 64; ++column) {
          load_tile(map, target + column * kHopperKeys * 128, full, column * 64, lower, int(kv_slice));
          load_tile(map, target + column * kHopperKeys * 128 + kTileKeys * 128, full, column * 64, upper, int(kv_slice));
        }
        barrier_arrive(full, Block::kFills);
      }
    } else {
      if (!Walk::kConsecutive || step.listed()) {
        const int32_t* const keys = block.list_keys();
        gather(target, source, row_bytes, [&](int row) { return keys[row]; });
      } else {
        gather(target, source, row_bytes, [&](int row) {
          const int key = row < kTileKeys ? lower + row : upper + row - kTileKeys;
          return key < length ? key : -1;
        });
      }
      Block::arrive_gathered(full, thread);
    }
    if (++buffer == Block::kBuffers) buffer = 0, phase ^= 1;
  }

  // 128 rows of 16-byte chunks by their index (-1: zeros), in the layout of the tile loads.
  template <class IndexOf>
  HA_DEVICE void gather(uint32_t target, const char* source, int row_bytes, IndexOf index_of) const {
    const int chunk = thread % kChunks, row0 = thread / kChunks;
    const bool inside = chunk * 16 < row_bytes;
    const uint32_t at = target + chunk / 8 * (kHopperKeys * 128) + row0 * 128 + ((chunk % 8 ^ row0 % 8) << 4);
    const char* const column = source + (inside ? chunk * 16 : 0);
#pragma unroll 4
    for (int pass = 0; pass < kHopperKeys / kRowsPerPass; ++pass) {
      const int index = index_of(row0 + pass * kRowsPerPass);
      copy_async(at + pass * kRowsPerPass * 128, column + int64_t(max(index, 0)) * row_bytes, inside && index >= 0);
    }
  }
};

}  // namespace ha
