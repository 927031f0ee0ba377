// The warps that plan: ahead of everyone else they read the plan, describe each tile and its steps, and write the lists of keys that are to
// be gathered. They hold two tiles and kHeld batches of steps at most.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct Planner {
  using Block = HopperBlock<T, P, Walk>;
  static constexpr int kWarps = Walk::Shape::kWarps, kRowsEach = Block::kRows / Block::kTable.planners;
  static constexpr int kEntriesEach = Block::kBatch * Block::kKeys / Block::kTable.planners;  // of a batch of steps
  static_assert(Walk::kConsecutive && Block::kBatch * kWarps <= Block::kTable.planners);
  static_assert(Block::kBatch * Block::kKeys % Block::kTable.planners == 0 && Block::kTable.planners % Block::kKeys == 0);

  const Block& block;
  const Geometry& g;
  int thread;
  StepPlace<Block::kBatch, Block::kHeld> place;

  HA_DEVICE void sync() const { sync_named(1, Block::kTable.planners); }

  // Tile number `turn` of this block of threads.
  HA_DEVICE void run(int turn, int64_t slice, int64_t tile) {
    const HopperArgs& args = block.args;
    const AttendConfig& config = args.config.attend;
    const int batch = int(slice) / int(g.heads_q), head = int(slice) % int(g.heads_q);
    const int parity = turn & 1;
    Walk& walk = block.walk(parity);

    barrier_wait(block.tile_done(parity), (turn >> 1 & 1) ^ 1);
    if (thread == 0) {
      walk.chosen = block.chosen(parity);
      walk.counts = block.counts(parity);
      walk.start(args.p, config, g, tile, batch, head);
    }
    sync();
    Row rows[kRowsEach];  // all on their way before the first is written
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) rows[i] = walk.row(g, thread + i * Block::kTable.planners);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) block.row(parity, thread + i * Block::kTable.planners) = rows[i];
    for (int q = thread / 32; q < config.query_blocks; q += Block::kTable.planners / 32) walk.read_plan(args.p, g, slice, q, thread % 32);
    sync();
    if (thread == 0) walk.plan_steps(g);
    barrier_arrive(block.tile_ready(parity));
    sync();
    const float factor = base2_factor(g);
    for (int j = 0, total = walk.total; j < total; j += Block::kBatch) describe(walk, j, min(total - j, Block::kBatch), factor);
  }

 private:
  // Steps j to j + count - 1.
  HA_DEVICE void describe(const Walk& walk, int j, int count, float factor) {
    const int first = place.slot;
    barrier_wait(block.steps_done(first), place.phase ^ 1);
    if (thread < count * kWarps) write_step(walk, j + thread / kWarps, thread % kWarps, &block.step(first + thread / kWarps));
    sync();
    if (thread < count) digest(walk, first + thread);
    constexpr int kStepsTogether = Block::kTable.planners / Block::kKeys;
    const int own = kStepsTogether > 1 ? thread / Block::kKeys : 0, entry = kStepsTogether > 1 ? thread % Block::kKeys : thread;
    Entry entries[kEntriesEach];  // all are looked up before any of them is written
#pragma unroll
    for (int i = 0; i < kEntriesEach; ++i) {
      const int s = i * kStepsTogether + own;
      if (listed(first, s, count)) entries[i] = walk.find_entry(block.step(first + s), entry);
    }
#pragma unroll
    for (int i = 0; i < kEntriesEach; ++i) {
      const int s = i * kStepsTogether + own, slot = first + s;
      if (listed(first, s, count))
        walk.write_entry(block.step(slot), entries[i], entry, 0, 1, factor, block.list_keys(slot), block.list_bias(slot));
    }
    barrier_arrive(block.steps_ready(first));
    place.advance(true);
  }

  HA_DEVICE bool listed(int first, int s, int count) const {
    return s < count && block.step(first + s).listed();
  }

  // Listed keys are gathered, and runs that pass the length but not the tensor's end; where no run is there, the first keys are loaded.
  HA_DEVICE void digest(const Walk& walk, int slot) const {
    const Step& step = block.step(slot);
    const int run = max(max(step.lower, step.upper), 0);
    const bool gathered = step.listed() || (walk.length != g.seq_k && run + kTileKeys > walk.length);
    uint32_t modes = uint32_t(gathered) << 31;
    for (int piece = 0; piece < kWarps; ++piece) modes |= uint32_t(step.modes[piece]) << (4 * piece);
    block.digest(slot) = {step.lower, step.upper, step.part, modes};
  }
};

}  // namespace ha
