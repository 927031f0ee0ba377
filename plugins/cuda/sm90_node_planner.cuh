// The warps that plan where nodes are met. A block of threads takes neighbouring tiles one after the other, and most of them belong to one
// node, whose samples are drawn once. Everything of a tile is looked up while the two before it are worked on; then it is written down.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct NodePlanner {
  using Block = HopperBlock<T, P, Walk>;
  static constexpr int kThreads = Block::kTable.planners, kKeys = Block::kKeys, kBatch = Block::kBatch;
  static constexpr int kRowsEach = Block::kRows / kThreads, kWarps = Walk::Shape::kWarps;
  // Steps that the threads take at once, a thread's entries of a batch.
  static constexpr int kTogether = kThreads / kKeys, kItems = kBatch / kTogether;
  static constexpr int kHeld = 2;  // of its samples, those that are kept from tile to tile
  static_assert(kTogether * kKeys == kThreads && kItems * kTogether == kBatch && kBatch <= kThreads && Block::kRows % kThreads == 0);

  // What a thread's entry of a step refers to: a place in the node's sorted keys (-1: none), the key there, the logarithm of its weight
  // in units of the logits.
  struct Item {
    int place, key;
    float bias;
  };

  const Block& block;
  const Geometry& g;
  int thread;
  StepPlace<kBatch, Block::kHeld> place;
  int64_t slice = -1;  // of the tile before, as its node and samples
  int node = -1;
  Item samples[kHeld] = {};

  HA_DEVICE void sync() const { sync_named(1, kThreads); }

  // Tile number `turn` of this block of threads.
  HA_DEVICE void run(int turn, int64_t next_slice, int64_t tile) {
    const HopperArgs& args = block.args;
    const AttendConfig& config = args.config.attend;
    const int parity = turn & 1, next_node = int(uint32_t(tile) / uint32_t(config.node_tiles));
    const bool fresh = slice != next_slice || node != next_node;
    slice = next_slice;
    node = next_node;

    Walk& walk = block.planned();
    sync();  // nobody looks at the tile before any more
    if (thread == 0) {
      if (fresh) {
        walk.chosen = block.chosen(0);
        walk.counts = block.counts(0);
        const int batch = int(slice) / int(g.heads_q), head = int(slice) % int(g.heads_q);
        walk.start(args.p, config, g, tile, batch, head);
        walk.slice = slice;
        walk.kv_slice = int64_t{batch} * g.heads_kv + head / int(g.group());
      } else {
        walk.move(config, tile);
      }
      for (int q = 0; q < config.query_blocks; ++q) walk.read_plan(args.p, g, slice, q, 0);
      walk.plan_steps(g);
    }
    sync();
    int rows[kRowsEach], total = -1;
    if (walk.holds_rows()) {
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) rows[i] = walk.row_index(thread + i * kThreads);
      total = walk.total;
      if (fresh) draw(walk);
    }
    Item items[kItems];
    int j = 0;
    do {
      if (j < total) find(walk, j, items);
      if (j == 0) show(walk, parity, turn >> 1 & 1, total, rows);
      if (j < total) write(walk, j, items);
      j += kBatch;
    } while (j < total);
  }

 private:
  // Describes the tile, as soon as its place is free.
  HA_DEVICE void show(const Walk& walk, int parity, int phase, int total, const int (&rows)[kRowsEach]) const {
    barrier_wait(block.tile_done(parity), phase ^ 1);
    if (thread == 0) {
      Walk& shown = block.walk(parity);
      shown.slice = walk.slice;
      shown.kv_slice = walk.kv_slice;
      shown.total = total;
      shown.far_masked = walk.far_masked;
    }
    if (total >= 0) {
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) block.row(parity, thread + i * kThreads) = walk.row_of(g, thread + i * kThreads, rows[i]);
    }
    barrier_arrive(block.tile_ready(parity));
  }

  // A thread's entries are number `slot()` of steps from `ahead()` on, kTogether apart.
  HA_DEVICE int slot() const { return thread % kKeys; }
  HA_DEVICE int ahead() const { return thread / kKeys; }

  // Of step `step` of the samples.
  HA_DEVICE Item sample(const Walk& walk, int step) const {
    const Sample drawn = walk.draw(step * kKeys + slot());
    return {int(drawn.key), walk.key_at(int(drawn.key)), log2f(drawn.weight) / base2_factor(g)};
  }
  HA_DEVICE void draw(const Walk& walk) {
#pragma unroll 1
    for (int i = 0; i < kHeld; ++i) put(samples, i, sample(walk, i * kTogether + ahead()));
  }
  // items[at] = item, where the items stay in registers.
  template <int kCount>
  HA_DEVICE static void put(Item (&items)[kCount], int at, const Item& item) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i == at) items[i] = item;
  }
  // Which of the kept samples is step `step` of the samples, or kHeld.
  HA_DEVICE int held(int step) const {
    const int from = step - ahead();
    return from >= 0 && from % kTogether == 0 ? min(from / kTogether, kHeld) : kHeld;
  }

  // Looks up the entries of steps j to j + kBatch - 1: all keys are on their way before the first is there.
  HA_DEVICE void find(const Walk& walk, int j, Item (&items)[kItems]) const {
    bool drawn = false;  // whether samples are met that are not kept
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = j + i * kTogether + ahead(), sample_step = at - walk.list_steps, kept = held(sample_step);
      if (sample_step < 0) {
        Step step{};
        walk.describe(at, step);
        const int entry = step.lower + slot(), place = entry < walk.counts[step.owner] ? walk.chosen[2 * step.owner] + entry : -1;
        items[i] = {place, walk.key_at(place), 0.0f};
      } else if (kept < kHeld) {
        items[i] = kept == 0 ? samples[0] : samples[1];
      } else {
        drawn = true;
      }
    }
    if (!drawn) return;
#pragma unroll 1
    for (int i = 0; i < kItems; ++i) {
      const int at = j + i * kTogether + ahead(), sample_step = at - walk.list_steps;
      if (at < walk.total && sample_step >= 0 && held(sample_step) == kHeld) put(items, i, sample(walk, sample_step));
    }
  }

  // Describes these steps, as soon as their places are free.
  HA_DEVICE void write(const Walk& walk, int j, const Item (&items)[kItems]) {
    const int first = place.slot, count = min(walk.total - j, kBatch);
    barrier_wait(block.steps_done(first), place.phase ^ 1);
    if (thread < count) {
      Step step{};
      walk.describe(j + thread, step);
      uint32_t modes = 1u << 31;
      for (int piece = 0; piece < kWarps; ++piece) modes |= uint32_t(walk.mode(step, piece)) << (4 * piece);
      block.digest(first + thread) = {step.lower, step.upper, step.part, modes};
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = i * kTogether + ahead();
      if (at >= count) break;
      const int key = walk.checked(items[i].key);
      block.list_keys(first + at)[slot()] = key;
      float* const bias = block.list_bias(first + at) + slot();
      Step step{};
      walk.describe(j + at, step);
      for (int q = 0; q < walk.query_blocks; ++q) {
        const bool visible = key >= 0 && (step.part == Part::kList ? q == step.owner : !walk.takes(q, items[i].place));
        bias[q * kKeys] = visible ? items[i].bias : -INFINITY;
      }
    }
    barrier_arrive(block.steps_ready(first));
    place.advance(true);
  }
};

}  // namespace ha
