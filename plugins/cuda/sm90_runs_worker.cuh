// A warp group that computes on runs of keys: 64 query rows of each tile. Products of a step's keys and of the values of the step before
// are started together; exponentials follow, above head size 64 while the latter run, else while other groups' products do.
#pragma once
#include "sm90_runs.cuh"
#include "sm90_store.cuh"

namespace ha {

template <class T, int P>
struct RunWorker {
  using Block = RunBlock<P>;
  using State = GroupState<T, P, Block::kKeys, Block::kRows>;
  using Place = RingPlace<Block::kBuffers>;
  static constexpr int kGroups = Block::kTable.groups, kKeys = Block::kKeys, kFirstTurn = 1;
  static constexpr bool kEarly = P > 64;  // three groups have fewer registers a thread

  const Block& block;
  const HopperArgs& args;
  const Geometry& g;
  int group, thread;
  Place place;
  RunSpan span;

  // Before the first tile.
  HA_DEVICE void start() const {
    if (group == kGroups - 1) give_turn();
  }

  HA_DEVICE void run(int turn) {
    const int parity = turn & 1;
    const float factor = base2_factor(g);
    const uint32_t queries = block.queries(parity) + group * kGroupRows * 128;
    State state;
    state.clear();
    barrier_wait(block.queries_ready(parity), turn >> 1 & 1);
    const RunTile<P>& tile = block.tile(parity);
    const RunWalk<P> walk = tile.walk;
    const int slice = tile.slice;
    int j = 0;
    span = tile.spans[group][0];
    Mode mode = next(tile, walk, j);
    const bool met = mode != Mode::kSkip;  // any key
    Place values = place;
    if (met) {
      barrier_wait(block.full(place.index), place.phase);
      take_turn();
      state.start_keys(queries, block.buffer(place.index));
      give_turn();
      product_wait<0>();
      finish_keys(state, walk, mode, j);
      state.refer(factor);
      state.template take_probabilities<false>(factor, [] {});
      values = leave(j);
      while ((mode = next(tile, walk, j)) != Mode::kSkip) {
        barrier_wait(block.full(values.index), values.phase);
        barrier_wait(block.full(place.index), place.phase);
        const uint32_t keys_at = uniform(block.buffer(place.index)), values_at = uniform(block.buffer(values.index));
        const uint32_t queries_at = uniform(queries);
        take_turn();
        state.start_keys(queries_at, keys_at);
        state.start_values(values_at);
        give_turn();
        product_wait<1>();
        finish_keys(state, walk, mode, j);
        state.template take_probabilities<kEarly>(factor, [&] {
          product_wait<0>();
          fence_registers(state.o);
          release(block.free(values.index), thread);
        });
        values = leave(j);
      }
    }
    if (args.config.attend.stored) finish<true>(state, walk, met, values, parity, slice);
    else finish<false>(state, walk, met, values, parity, slice);
  }

 private:
  // Adds the last values, where any key was `met`, and stores the rows. kStored: some have met keys in earlier launches.
  template <bool kStored>
  HA_DEVICE void finish(State& state, const RunWalk<P>& walk, bool met, const Place& values, int parity, int slice) const {
    const auto row_of = [&](int half) {
      const int position = walk.first + row(half);
      const bool present = position >= walk.first_row && position <= walk.last_row;
      return Row{0, 0, present ? position - walk.row0 : -1, kStored && present && walk.met_before(g, position)};
    };
    SeenRow<P> seen[2];  // on its way while the last products run
    if constexpr (kStored) {
#pragma unroll
      for (int half = 0; half < 2; ++half) seen[half] = fetch_row<P>(args, thread, slice, row_of(half));
    }
    barrier_arrive(block.queries_free(parity));  // by each thread: of the tile's description, too, nothing is read any more
    if (met) drain(block, state, values, thread);
    if constexpr (kStored) {
      store_rows<T, P, true>(args, state, thread, slice, seen);
    } else {
      const Row rows[2] = {row_of(0), row_of(1)};
      store_rows<T, P, false>(args, state, thread, slice, rows);
    }
  }

  // The groups start their products one after the other, so that some have their softmax while one's products run. Steps that a group
  // passes over are turns, too.
  HA_DEVICE void take_turn() const { sync_named(kFirstTurn + group, 256); }
  HA_DEVICE void give_turn() const { arrive_named(kFirstTurn + (group == kGroups - 1 ? 0 : group + 1), 256); }

  HA_DEVICE int row(int half) const { return group * kGroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half; }

  // The first step from j on that the group takes part in, or kSkip at the end. The others' buffers are passed over.
  HA_DEVICE Mode next(const RunTile<P>& tile, const RunWalk<P>& walk, int& j) {
    for (;; ++j) {
      if (j == walk.local_steps) span = tile.spans[group][1];
      if (j >= span.start && j < span.stop) return j >= span.plain && j < span.edge ? Mode::kPlain : Mode::kMasked;
      if (j >= walk.total) return Mode::kSkip;
      for (int i = 0; i < 2; ++i) {
        barrier_wait(block.full(place.index), place.phase);
        if (i == 0) take_turn(), give_turn();
        release_buffer();
      }
    }
  }
  HA_DEVICE void release_buffer() {
    release(block.free(place.index), thread);
    place.advance();
  }
  HA_DEVICE void finish_keys(State& state, const RunWalk<P>& walk, Mode mode, int j) {
    fence_registers(state.logits);
    release_buffer();
    if (mode == Mode::kMasked) mask(state, walk, j);
  }
  HA_DEVICE Place leave(int& j) {
    const Place values = place;
    place.advance();
    ++j;
    return values;
  }
  HA_DEVICE void mask(State& state, const RunWalk<P>& walk, int j) const {
    const int column = walk.key(j) + thread % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Bounds b = walk.bounds(g, j, walk.first + row(half));
      const uint32_t seen = columns_below(b.high - column) & ~columns_below(b.low - column);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i)
        if (!(seen >> i & 1)) state.logits[i / 2 * 4 + 2 * half + i % 2] = -INFINITY;
    }
  }
  // Of a thread's columns 0, 1, 8, 9, 16, 17 ... those below n, as bits.
  HA_DEVICE static uint32_t columns_below(int n) {
    static_assert(kKeys / 4 == 32);
    const int count = n <= 0 ? 0 : n / 8 * 2 + min(n % 8, 2);
    return count >= 32 ? ~0u : (1u << count) - 1;
  }
};

}  // namespace ha
