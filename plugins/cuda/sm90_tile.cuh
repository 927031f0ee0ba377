// Where everything of one block of threads of the Hopper kernels lies in shared memory: queries, a ring of buffers that keys and values
// pass through, what is known of two tiles and of some batches of steps, and the barriers between the warps.
#pragma once
#include "sm90_config.h"
#include "sm90_device.cuh"
#include "walk.cuh"

namespace ha {

// Whose tiles: neighbouring positions and all that they meet, what the plan of `blocks` names for them, rows of a node.
enum class Tiles { kPositions, kPairs, kNodes };
// The constants that the walks take: a piece of 64 rows is their `warp`'s.
template <int P, Tiles kTiles = Tiles::kPositions>
struct HopperShape {
  static constexpr HopperTable kTable = kTiles == Tiles::kNodes ? node_table(P) : kTiles == Tiles::kPairs ? pair_table(P) : hopper_table(P);
  static constexpr int kWarps = kTable.groups * kTable.pieces, kWarpRows = kGroupRows, kTileRows = kTable.rows(), kKeys = kTable.keys;
  static constexpr bool kPairs = true, kOwnedPairs = kTiles != Tiles::kPairs;
  static constexpr int kPairBlock = kTileKeys;
};

struct HopperArgs {
  HaParams p;
  float* lse;
  HopperConfig config;
  TileMap queries, keys, values;
};

// What those that load and compute need to know of a step, in one load.
struct alignas(16) Digest {
  int lower, upper;
  Part part;
  uint32_t modes;  // four bits a piece of 64 rows; the last bit: gathered row by row

  HA_DEVICE Mode mode(int piece) const { return Mode(modes >> (4 * piece) & 15); }
  HA_DEVICE bool gathered() const { return modes >> 31; }
  HA_DEVICE bool listed() const { return is_listed(part); }
};
static_assert(sizeof(Digest) == kDigestBytes);

template <class T, int P, class Walk>
struct HopperBlock {
  static constexpr HopperTable kTable = Walk::Shape::kTable;
  static constexpr int kPieces = kTable.pieces, kQueries = kTable.queries;
  static constexpr int kBuffers = kTable.buffers, kKeys = kTable.keys, kRows = kTable.rows(), kBatch = kTable.batch, kHeld = kTable.held;
  static constexpr int kBufferRows = kTable.buffer_rows(), kBufferBytes = kBufferRows * P * 2;
  static_assert(sizeof(Walk) <= kWalkBytes);

  const HopperArgs& args;
  unsigned char* shared;
  uint32_t base;

  template <class X>
  HA_DEVICE X* at(int offset) const {
    return reinterpret_cast<X*>(shared + offset);
  }
  HA_DEVICE const HopperShared& offsets() const { return args.config.shared; }
  HA_DEVICE Walk& walk(int parity) const { return *at<Walk>(offsets().walk + parity * kWalkBytes); }
  HA_DEVICE Walk& planned() const { return walk(2); }  // for those that plan alone
  HA_DEVICE Row& row(int parity, int row) const { return at<Row>(offsets().rows)[parity * kRows + row]; }
  HA_DEVICE int32_t* chosen(int parity) const {
    return at<int32_t>(offsets().chosen + parity * ((offsets().counts - offsets().chosen) / 2));
  }
  HA_DEVICE int32_t* counts(int parity) const { return at<int32_t>(offsets().counts) + parity * args.config.attend.query_blocks; }

  // Steps of the ring by slot, 0 to kHeld kBatch - 1.
  HA_DEVICE Step& step(int slot) const { return at<Step>(offsets().steps)[slot]; }
  HA_DEVICE Digest& digest(int slot) const { return at<Digest>(offsets().digests)[slot]; }
  HA_DEVICE int32_t* list_keys(int slot) const { return at<int32_t>(offsets().keys) + slot * kKeys; }
  HA_DEVICE float* list_bias(int slot) const { return at<float>(offsets().bias) + slot * args.config.attend.query_blocks * kKeys; }

  // Queries of a tile by its number among those of this block of threads.
  HA_DEVICE uint32_t queries(int turn) const { return base + turn % kQueries * (kRows * P * 2); }
  HA_DEVICE uint32_t buffer(int index) const { return base + kQueries * kRows * P * 2 + index * kBufferBytes; }
  HA_DEVICE uint32_t full(int index) const { return base + offsets().barriers + index * 8; }
  HA_DEVICE uint32_t free(int index) const { return full(kBuffers + index); }
  HA_DEVICE uint32_t queries_ready(int turn) const { return full(2 * kBuffers + turn % kQueries); }
  HA_DEVICE uint32_t queries_free(int turn) const { return full(2 * kBuffers + kQueries + turn % kQueries); }
  HA_DEVICE static int queries_phase(int turn) { return turn / kQueries & 1; }
  HA_DEVICE uint32_t tile_ready(int parity) const { return full(2 * (kBuffers + kQueries) + parity); }
  HA_DEVICE uint32_t tile_done(int parity) const { return full(2 * (kBuffers + kQueries) + 2 + parity); }
  HA_DEVICE uint32_t steps_ready(int slot) const { return full(2 * (kBuffers + kQueries) + 4 + slot / kBatch); }
  HA_DEVICE uint32_t steps_done(int slot) const { return full(2 * (kBuffers + kQueries) + 4 + kHeld + slot / kBatch); }

  HA_DEVICE void init_barriers() const {
    constexpr int kWorkers = 128 * kTable.groups, kWorkerWarps = kWorkers / 32;
    for (int i = 0; i < kBuffers; ++i) barrier_init(full(i), kFills), barrier_init(free(i), kWorkerWarps);
    for (int i = 0; i < kQueries; ++i) barrier_init(queries_ready(i), kFills), barrier_init(queries_free(i), kWorkerWarps);
    for (int i = 0; i < 2; ++i) {
      barrier_init(tile_ready(i), kTable.planners);
      barrier_init(tile_done(i), kWorkers);
    }
    for (int i = 0; i < kHeld; ++i) {
      barrier_init(steps_ready(i * kBatch), kTable.planners);
      barrier_init(steps_done(i * kBatch), kWorkers + kTable.loaders);
    }
    barrier_publish();
  }

  // A buffer is filled when every loading thread has announced its copies and the first of them has arrived for the description, or for
  // tile loads and all.
  static constexpr int kFills = kTable.loaders + 1;
};

// A warp arrives once for all its threads, when each of them has come here: for what its products have read. What threads have read by
// themselves each of them says: there compute-sanitizer's racecheck follows every thread, and no warp waits for its slowest.
HA_DEVICE void release(uint32_t barrier, int thread) {
  sync_warp();
  if (thread % 32 == 0) barrier_arrive(barrier);
}

// A place in the ring of buffers, and whether it has gone round an odd number of times.
template <int kBuffers>
struct RingPlace {
  int index = 0, phase = 0;
  HA_DEVICE void advance() {
    if (++index == kBuffers) index = 0, phase ^= 1;
  }
};
// A slot of the ring of steps, and whether its batch has gone round an odd number of times.
template <int kBatch, int kHeld>
struct StepPlace {
  int slot = 0, phase = 0;
  HA_DEVICE bool starts_batch() const { return slot % kBatch == 0; }
  HA_DEVICE bool ends_batch(bool last) const { return last || slot % kBatch == kBatch - 1; }
  // `last`: of its tile.
  HA_DEVICE void advance(bool last) {
    slot = (last ? slot | (kBatch - 1) : slot) + 1;
    if (slot == kHeld * kBatch) slot = 0, phase ^= 1;
  }
};

// Where a warp group that computes is in both rings.
template <class Block>
struct RingReader {
  const Block& block;
  int thread;  // of the group
  RingPlace<Block::kBuffers> place;
  StepPlace<Block::kBatch, Block::kHeld> step;

  // The next step, whose keys have arrived.
  HA_DEVICE Digest await_keys() const {
    if (step.starts_batch()) barrier_wait(block.steps_ready(step.slot), step.phase);
    barrier_wait(block.full(place.index), place.phase);
    return block.digest(step.slot);
  }
  HA_DEVICE void release_buffer() {
    release(block.free(place.index), thread);
    place.advance();
  }
  // Nothing is read any more of the current step's description.
  HA_DEVICE void finish_step(int& left) {
    const bool last = --left == 0;
    if (step.ends_batch(last)) barrier_arrive(block.steps_done(step.slot));
    step.advance(last);
  }
};

}  // namespace ha
