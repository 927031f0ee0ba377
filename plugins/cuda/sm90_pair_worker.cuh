// A warp group that computes on what the plan of `blocks` names: 64 query rows of each tile, which are one query block, on 64 keys a step.
// Products of a step's keys and of the values of the step before are started together; maxima are sought while the latter run.
#pragma once
#include "sm90_state.cuh"
#include "sm90_store.cuh"
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct PairWorker : RingReader<HopperBlock<T, P, Walk>> {
  using Block = HopperBlock<T, P, Walk>;
  using Reader = RingReader<Block>;
  using Reader::block, Reader::thread, Reader::place, Reader::step, Reader::await_keys, Reader::release_buffer, Reader::finish_step;
  using State = GroupState<T, P, Block::kKeys, Block::kRows, Block::kBufferRows>;
  static constexpr int kKeys = Block::kKeys, kFirstTurn = 3;
  static_assert(Block::kTable.groups == 2 && Block::kTable.runs == 2);

  const Geometry& g;
  int group;  // of the block's working groups

  // Before the first tile.
  HA_DEVICE void start() const {
    if (group == 1) give_turn();
  }

  HA_DEVICE void run(int turn, int64_t slice) {
    const int parity = turn & 1;
    const Walk& walk = block.walk(parity);
    barrier_wait(block.tile_ready(parity), turn >> 1 & 1);
    barrier_wait(block.queries_ready(turn), Block::queries_phase(turn));
    int left = walk.total;
    const float factor = base2_factor(g);
    const uint32_t queries = uniform(block.queries(turn)) + group * kGroupRows * 128;
    State state;
    state.clear();
    if (left > 0) {
      Digest digest = await_step();
      start_keys(state, digest, queries);
      product_wait<0>();
      finish_keys(state, walk, digest, parity);
      state.refer(factor);
      if (state.raise(factor)) state.rescale();
      state.take_probabilities(factor);
      Values values = leave(left, digest);
      while (left > 0) {
        digest = await_step();
        await(values);
        take_turn();
        start_keys(state, digest, queries);
        state.start_values(uniform(values.address));
        give_turn();
        product_wait<1>();
        finish_keys(state, walk, digest, parity);
        const bool rises = state.raise(factor);
        product_wait<0>();
        fence_registers(state.o);
        release(values.free, thread);
        if (rises) state.rescale();
        state.take_probabilities(factor);
        values = leave(left, digest);
      }
      release(block.queries_free(turn), thread);
      await(values);
      state.start_values(uniform(values.address));
      product_wait<0>();
      fence_registers(state.o);
      release(values.free, thread);
    } else {
      release(block.queries_free(turn), thread);
    }
    const Row rows[2] = {block.row(parity, row_of(0)), block.row(parity, row_of(1))};
    store_rows<T, P, false>(block.args, state, thread, slice, rows);
    barrier_arrive(block.tile_done(parity));
  }

 private:
  // A step's values: where they lie, and their buffer's barriers.
  struct Values {
    uint32_t address, full, free;
    int phase;
    bool gathered;
  };
  // Two neighbouring columns of a list.
  struct alignas(8) Pair {
    float bias[2];
  };

  // Both groups have the same steps, and start their products one after the other.
  HA_DEVICE void take_turn() const { sync_named(kFirstTurn + group, 256); }
  HA_DEVICE void give_turn() const { arrive_named(kFirstTurn + (group ^ 1), 256); }

  HA_DEVICE int row_of(int half) const { return group * kGroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
  // Where the group's part of the next buffer lies: it has a block of its own, samples are everyone's.
  HA_DEVICE uint32_t own_part(const Digest& digest) const {
    return block.buffer(place.index) + (digest.listed() ? 0 : group * kKeys * 128);
  }

  // The next step, whose keys have arrived.
  HA_DEVICE Digest await_step() const {
    const Digest digest = await_keys();
    if (digest.gathered()) fence_products();  // by other threads
    return digest;
  }
  HA_DEVICE void await(const Values& values) const {
    barrier_wait(values.full, values.phase);
    if (values.gathered) fence_products();
  }

  // Products begin with biases, the same ones for all of the group's rows.
  HA_DEVICE void start_keys(State& state, const Digest& digest, uint32_t queries) const {
    const bool biased = digest.mode(group) == Mode::kBiased;
    if (biased) {
      const float* const bias = block.list_bias(step.slot) + group * kKeys + thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const Pair pair = *reinterpret_cast<const Pair*>(bias + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) state.logits[4 * i + k] = pair.bias[k % 2];
      }
    }
    state.start_keys(queries, uniform(own_part(digest)), biased);
  }
  HA_DEVICE void finish_keys(State& state, const Walk& walk, const Digest& digest, int parity) {
    fence_registers(state.logits);
    release_buffer();
    if (digest.mode(group) != Mode::kMasked) return;
    const int start = group ? digest.upper : digest.lower, column = start + thread % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const Bounds b = walk.bounds(digest.part, row, start >= 0 ? block.row(parity, row).far : 0);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const int key = column + i / 2 * 8 + i % 2;
        if (key < b.low || key >= b.high) state.logits[i / 2 * 4 + 2 * half + i % 2] = -INFINITY;
      }
    }
  }
  // The step is done but for its values.
  HA_DEVICE Values leave(int& left, const Digest& digest) {
    const Values values{own_part(digest), block.full(place.index), block.free(place.index), place.phase, digest.gathered()};
    place.advance();
    finish_step(left);
    return values;
  }
};

}  // namespace ha
