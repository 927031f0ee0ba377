// The warp that loads, where tiles meet runs of keys alone: its first thread starts tile loads, as long as there are free buffers.
#pragma once
#include "sm90_runs.cuh"

namespace ha {

template <class T, int P>
struct RunLoader {
  using Block = RunBlock<P>;
  const Block& block;
  const HopperArgs& args;
  const Geometry& g;
  int lane;
  RingPlace<Block::kBuffers> place;

  HA_DEVICE void run(int turn, int slice, int tile) {
    const int batch = slice / int(g.heads_q), head = slice % int(g.heads_q);
    const int kv_slice = batch * int(g.heads_kv) + head / int(g.group()), parity = turn & 1;
    RunWalk<P> walk;
    walk.start(args.p, args.config.attend, g, tile, batch);
    if (lane < Block::kTable.groups) {  // a thread for each
      const uint32_t ready = block.queries_ready(parity);
      RunTile<P>& shown = block.tile(parity);
      const RunSpan spans[2] = {walk.span(g, lane, false), walk.span(g, lane, true)};
      barrier_wait(block.queries_free(parity), (turn >> 1 & 1) ^ 1);
      if (lane == 0) {
        barrier_expect(ready, Block::kQueryBytes);
        load_tiles<Block::kRows>(args.queries, block.queries(parity), ready, walk.first - walk.row0, slice);
        shown.walk = walk;
        shown.slice = slice;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) shown.spans[lane][i] = spans[i];
      barrier_arrive(ready);
    }
    for (int j = 0; j < walk.total; ++j) {
      const int key = walk.key(j);
      load(args.keys, key, kv_slice);
      if (key + Block::kKeys > walk.length && walk.length < g.seq_k) gather(key, walk.length, kv_slice);
      else load(args.values, key, kv_slice);
    }
  }

 private:
  template <int kRows>
  HA_DEVICE void load_tiles(const TileMap& map, uint32_t target, uint32_t barrier, int row, int slice) const {
#pragma unroll
    for (int column = 0; column < P / 64; ++column)
#pragma unroll
      for (int i = 0; i < kRows; i += kTileKeys)
        load_tile(map, target + column * kRows * 128 + i * 128, barrier, column * 64, row + i, slice);
  }
  // One thread fills the next buffer.
  HA_DEVICE void load(const TileMap& map, int key, int kv_slice) {
    if (lane == 0) {
      const uint32_t full = block.full(place.index);
      barrier_wait(block.free(place.index), place.phase ^ 1);
      barrier_expect(full, Block::kBufferBytes);
      load_tiles<Block::kKeys>(map, block.buffer(place.index), full, key, kv_slice);
      barrier_arrive(full, Block::kFills);
    }
    place.advance();
  }
  // All fill it with values, of which those past the length are zeros (rule 2). They meet first: who is two rounds of the ring ahead of the
  // first thread would take the buffer for free.
  HA_DEVICE void gather(int key, int length, int kv_slice) {
    constexpr int kChunks = P / 8;
    sync_warp();
    barrier_wait(block.free(place.index), place.phase ^ 1);
    const int row_bytes = int(g.head_dim_v) * 2;
    const char* const source = static_cast<const char*>(args.p.v) + int64_t(kv_slice) * g.seq_k * row_bytes;
    for (int i = lane; i < Block::kKeys * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool present = key + row < length && chunk * 16 < row_bytes;
      copy_async(block.buffer(place.index) + chunk / 8 * (Block::kKeys * 128) + row * 128 + ((chunk % 8 ^ row % 8) << 4),
                 source + (present ? int64_t(key + row) * row_bytes + chunk * 16 : 0), present);
    }
    copy_commit();
    copy_wait<0>();
    fence_products();
    barrier_arrive(block.full(place.index));
    place.advance();
  }
};

}  // namespace ha
