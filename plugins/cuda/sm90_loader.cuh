// The warps that load: queries of each tile, then keys and values of its steps, as long as there are free buffers. Runs of keys are tiles
// of the copy engine, rows that the plan lists are gathered by cp.async.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct Loader {
  using Block = HopperBlock<T, P, Walk>;
  static constexpr uint32_t kChunks = P / 8;
  static constexpr int kRowsPerPass = Block::kTable.loaders / int(kChunks), kKeys = Block::kKeys, kBufferRows = Block::kBufferRows;
  static constexpr bool kNodes = !Walk::kConsecutive, kShort = kNodes || Block::kTable.runs > 1;  // tiles of a few steps
  // Copies into a buffer announce themselves when they land.
  static constexpr bool kAnnounced = kShort;
  // Steps that are loaded before their tile's queries.
  static constexpr int kEarly = Block::kQueries > 1 || !kShort ? 0 : kNodes ? 1 : 2;
  static_assert(kNodes || kBufferRows == 2 * kTileKeys);

  const Block& block;
  const Geometry& g;
  int thread;
  RingPlace<Block::kBuffers> place;
  StepPlace<Block::kBatch, Block::kHeld> step;
  bool ran_ahead = false;  // the first thread alone has loaded tiles since the threads were together
  int unpublished = 0;  // gathered buffers, the last ones, that have not been announced yet

  // Tile number `turn` of this block of threads.
  HA_DEVICE void run(int turn, int64_t slice) {
    const HopperArgs& args = block.args;
    const int parity = turn & 1;
    const Walk& walk = block.walk(parity);
    int64_t kv_slice = 0;
    int length = 0;
    if constexpr (Walk::kConsecutive) {
      const int batch = int(slice) / int(g.heads_q), head = int(slice) % int(g.heads_q);
      kv_slice = int64_t{batch} * g.heads_kv + head / int(g.group());
      length = int(g.length(args.p.lengths, batch));
    }
    await(block.tile_ready(parity), turn >> 1 & 1);
    if constexpr (kNodes) slice = walk.slice, kv_slice = walk.kv_slice;  // the planners know them
    const int total = walk.total;
    int j = 0;
    for (; j < min(total, kEarly); ++j) load_step(j, total, kv_slice, length);
    await(block.queries_free(turn), Block::queries_phase(turn) ^ 1);
    if (Walk::kConsecutive || total <= 0) sync();
    if (total >= 0) load_queries(walk, slice, turn);
    else if (thread == 0) barrier_arrive(block.queries_ready(turn), Block::kFills);
    for (; j < total; ++j) load_step(j, total, kv_slice, length);
  }

  // The last of a thread's duties: none of its copies is under way when it ends.
  HA_DEVICE void finish() {
    if constexpr (kAnnounced) copy_commit(), copy_wait<0>();
    else publish_all();
  }

 private:
  // Announces what has been gathered and does not announce itself.
  HA_DEVICE void publish_all() {
    if constexpr (!kAnnounced) {
      copy_wait<0>();
      while (unpublished) publish();
    }
  }

  // Step j of a tile's.
  HA_DEVICE void load_step(int j, int total, int64_t kv_slice, int length) {
    const HopperArgs& args = block.args;
    const bool last = j == total - 1;
    if (step.starts_batch()) {
      await(block.steps_ready(step.slot), step.phase);
      if (Walk::kConsecutive) sync();
    }
    const Digest digest = block.digest(step.slot);
    load(digest, args.keys, args.p.k, g.head_dim, kv_slice, length);
    load(digest, args.values, args.p.v, g.head_dim_v, kv_slice, length);
    // Those that compute may be done with a step's keys while a thread here has yet to look up its values.
    if (step.ends_batch(last)) barrier_arrive(block.steps_done(step.slot));
    step.advance(last);
  }

  static constexpr int kAhead = 3;  // gathered buffers that are on their way while the next is started

  // Who waits for a barrier that meanwhile goes on by two phases waits for ever. Gathering needs every thread, so that none can fall
  // behind; where the first one loads tiles alone, the threads meet at every batch of steps. What others may need is announced first.
  HA_DEVICE void sync() {
    publish_all();
    sync_named(2, Block::kTable.loaders);
  }

  // Waits for a barrier. What has been gathered is announced first, because those who complete the barrier may need it.
  HA_DEVICE void await(uint32_t barrier, int parity) {
    if (barrier_test(barrier, parity)) return;
    publish_all();
    barrier_wait(barrier, parity);
  }
  // This thread's copies into the oldest of the unpublished buffers have landed.
  HA_DEVICE void publish() {
    fence_products();
    const int index = place.index - unpublished;
    barrier_arrive(block.full(index < 0 ? index + Block::kBuffers : index));
    --unpublished;
  }

  HA_DEVICE void load_queries(const Walk& walk, int64_t slice, int turn) {
    const HopperArgs& args = block.args;
    const uint32_t target = block.queries(turn), ready = block.queries_ready(turn);
    if constexpr (Walk::kConsecutive) {
      if (thread != 0) return;
      barrier_expect(ready, Block::kRows * P * 2);
#pragma unroll
      for (int column = 0; column < P / 64; ++column)
#pragma unroll
        for (int row = 0; row < Block::kRows; row += kTileKeys)
          load_tile(args.queries, target + column * Block::kRows * 128 + row * 128, ready, column * 64, walk.first - walk.row0 + row,
                    int(slice));
      barrier_arrive(ready, Block::kFills);
    } else {
      const int row_bytes = int(g.head_dim) * 2;
      const char* const source = static_cast<const char*>(args.p.q) + slice * g.seq_q * row_bytes;
      const Row* const rows = &block.row(turn & 1, 0);
      gather_fours<Block::kRows>(target, source, row_bytes, [&](int row) {
        return Four{{rows[row].index, rows[row + 1].index, rows[row + 2].index, rows[row + 3].index}};
      });
      barrier_arrive_copied(ready);
      if (thread == 0) barrier_arrive(ready);
    }
  }

  // Fills the next buffer with a step's keys or values. Keys past the length are zeros (rule 2).
  HA_DEVICE void load(const Digest& digest, const TileMap& map, const void* base, int64_t head_dim, int64_t kv_slice, int length) {
    const uint32_t full = block.full(place.index), free = block.free(place.index), target = block.buffer(place.index);
    // A half that is not there is masked; its values have to be numbers all the same.
    const int lower = digest.lower >= 0 ? digest.lower : max(digest.upper, 0);
    const int upper = digest.upper >= 0 ? digest.upper : lower;
    if (Walk::kConsecutive && !digest.gathered()) {
      publish_all();
      ran_ahead = true;
      if (thread == 0) {
        barrier_wait(free, place.phase ^ 1);
        barrier_expect(full, Block::kBufferBytes);
#pragma unroll
        for (int column = 0; column < P / 64; ++column) {
          load_tile(map, target + column * kBufferRows * 128, full, column * 64, lower, int(kv_slice));
          load_tile(map, target + column * kBufferRows * 128 + kTileKeys * 128, full, column * 64, upper, int(kv_slice));
        }
        barrier_arrive(full, Block::kFills);
      }
      place.advance();
      return;
    }
    if (ran_ahead) sync();
    ran_ahead = false;
    await(free, place.phase ^ 1);
    const int row_bytes = int(head_dim) * 2;
    const char* const source = static_cast<const char*>(base) + kv_slice * g.seq_k * row_bytes;
    if constexpr (kNodes) {
      const int32_t* const keys = block.list_keys(step.slot);
      gather_fours<kKeys>(target, source, row_bytes, [&](int row) { return *reinterpret_cast<const Four*>(keys + row); });
    } else if (digest.listed()) {
      const int32_t* const keys = block.list_keys(step.slot);
      gather<kKeys, kBufferRows>(target, source, row_bytes, [&](int row) { return keys[row]; });
    } else {
      gather<kBufferRows, kBufferRows>(target, source, row_bytes, [&](int row) {
        const int key = row < kTileKeys ? lower + row : upper + row - kTileKeys;
        return key < length ? key : -1;
      });
    }
    if (thread == 0) barrier_arrive(full);  // for the step's description
    place.advance();
    if constexpr (kAnnounced) {  // by those that compute they are fenced
      barrier_arrive_copied(full);
    } else {
      copy_commit();
      if (++unpublished > kAhead) {
        copy_wait<kAhead>();
        publish();
      }
    }
  }

  // kRows rows of 16-byte chunks by their index (-1: zeros), in the layout of the tile loads into kRowsThere.
  template <int kRows, int kRowsThere, class IndexOf>
  HA_DEVICE void gather(uint32_t target, const char* source, int row_bytes, IndexOf index_of) const {
    constexpr int kPasses = kRows / kRowsPerPass, kTogether = kPasses < 8 ? kPasses : 8;
    static_assert(kRowsPerPass % 8 == 0 && kPasses % kTogether == 0);
    const uint32_t chunk = uint32_t(thread) % kChunks, row0 = uint32_t(thread) / kChunks;
    const bool inside = int(chunk) * 16 < row_bytes;
    const char* const from = settled(source + (inside ? chunk * 16 : 0));
    const uint32_t to = target + chunk / 8 * (kRowsThere * 128) + row0 * 128 + ((chunk % 8 ^ row0 % 8) << 4);
#pragma unroll
    for (int first = 0; first < kPasses; first += kTogether) {
      int index[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) index[i] = index_of(int(row0) + (first + i) * kRowsPerPass);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        copy_async(to + (first + i) * kRowsPerPass * 128, from + uint64_t(uint32_t(max(index[i], 0))) * uint32_t(row_bytes),
                   inside && index[i] >= 0);
    }
  }

  // The same where a thread has neighbouring rows: indices(r) = those of rows r to r + 3, read together.
  struct alignas(16) Four {
    int32_t index[4];
  };
  template <int kRows, class IndicesOf>
  HA_DEVICE void gather_fours(uint32_t target, const char* source, int row_bytes, IndicesOf indices) const {
    constexpr int kPasses = kRows / kRowsPerPass, kTogether = kPasses < 8 ? kPasses : 8;
    static_assert(kTogether % 4 == 0 && kPasses % kTogether == 0);
    const uint32_t chunk = uint32_t(thread) % kChunks, row0 = uint32_t(thread) / kChunks * kPasses;
    const bool inside = int(chunk) * 16 < row_bytes;
    const char* const from = settled(source + (inside ? chunk * 16 : 0));
    const uint32_t to = settled(target + chunk / 8 * (kRows * 128) + row0 * 128 + ((chunk % 8 ^ row0 % 8) << 4));
#pragma unroll
    for (int first = 0; first < kPasses; first += kTogether) {
      Four found[kTogether / 4];
#pragma unroll
      for (int i = 0; i < kTogether / 4; ++i) found[i] = indices(int(row0) + first + 4 * i);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int index = found[i / 4].index[i % 4];
        copy_async((to ^ uint32_t(i) << 4) + (first + i) * 128, from + uint64_t(uint32_t(max(index, 0))) * uint32_t(row_bytes),
                   inside && index >= 0);
      }
    }
  }
};

}  // namespace ha
