// A warp group that computes: 64 query rows of each tile. Its products of a step's values and of the next step's keys run one after the
// other, while another group has its softmax.
#pragma once
#include "sm90_state.cuh"
#include "sm90_store.cuh"
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct Worker : RingReader<HopperBlock<T, P, Walk>> {
  using Block = HopperBlock<T, P, Walk>;
  using Reader = RingReader<Block>;
  using Reader::block, Reader::thread, Reader::place, Reader::step, Reader::await_keys, Reader::release_buffer, Reader::finish_step;
  using State = GroupState<T, P, Block::kKeys, Block::kRows>;

  static constexpr int kKeys = Block::kKeys, kFirstTurn = 3;
  // Whether two groups may start their products in turns, so that one has its softmax while the other's products run. It pays where the
  // softmax takes longer than the products.
  static constexpr bool kTurns = P == 64;
  static_assert(Walk::kConsecutive && Block::kTable.groups == 2);

  using Place = RingPlace<Block::kBuffers>;

  const Geometry& g;
  int group;  // of the block's working groups

  // Before the first tile.
  HA_DEVICE void start() const {
    if (kTurns && group == 1) arrive_named(kFirstTurn, 256);
  }

  HA_DEVICE void run(int turn, int64_t slice) {
    const int parity = turn & 1;
    const Walk& walk = block.walk(parity);
    barrier_wait(block.tile_ready(parity), turn >> 1 & 1);
    barrier_wait(block.queries_ready(turn), Block::queries_phase(turn));
    const int total = walk.total;
    const float factor = base2_factor(g);
    const uint32_t queries = block.queries(turn) + group * kGroupRows * 128;
    State state;
    state.clear();
    const bool in_turns = takes_turns(walk);
    int left = total;
    Digest digest;
    if (next(left, digest)) {
      state.start_keys(queries, block.buffer(place.index));
      product_wait<0>();
      finish_keys(state, walk, digest, parity, factor);
      Place values = leave(left);
      while (next(left, digest)) {
        barrier_wait(block.full(values.index), values.phase);
        const uint32_t values_at = uniform(block.buffer(values.index)), keys_at = uniform(block.buffer(place.index));
        if (in_turns) sync_named(kFirstTurn + group, 256);
        state.start_values(values_at);
        state.start_keys(queries, keys_at);
        if (in_turns) arrive_named(kFirstTurn + (group ^ 1), 256);
        product_wait<0>();
        fence_registers(state.o);
        release(block.free(values.index), thread);
        finish_keys(state, walk, digest, parity, factor);
        values = leave(left);
      }
      release(block.queries_free(turn), thread);
      drain(block, state, values, thread);
    } else {
      release(block.queries_free(turn), thread);
    }
    const Row rows[2] = {block.row(parity, row_of(0)), block.row(parity, row_of(1))};
    store_rows<T, P, false>(block.args, state, thread, slice, rows);
    barrier_arrive(block.tile_done(parity));
  }

 private:
  HA_DEVICE bool takes_turns(const Walk& walk) const {
    if constexpr (kTurns) return walk.every_warp();
    return false;
  }

  HA_DEVICE int row_of(int half) const { return group * kGroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half; }

  // Waits for the keys of the next step that the group takes part in. Between two of its own lie at most one for each other group, so
  // that a buffer is never waited for that cannot be filled while the group holds another.
  HA_DEVICE bool next(int& left, Digest& digest) {
    if (left == 0) return false;
    digest = await_keys();
    return digest.mode(group) != Mode::kSkip || pass_over(left, digest);
  }
  HA_DEVICE bool pass_over(int& left, Digest& digest) {
    do {
      release_buffer();
      barrier_wait(block.full(place.index), place.phase);
      release_buffer();
      finish_step(left);
      if (left == 0) return false;
      digest = await_keys();
    } while (digest.mode(group) == Mode::kSkip);
    return true;
  }

  // From the products to probabilities; those of the step before have been added.
  HA_DEVICE void finish_keys(State& state, const Walk& walk, const Digest& digest, int parity, float factor) {
    fence_registers(state.logits);
    release_buffer();
    const Mode mode = digest.mode(group);
    if (mode == Mode::kBiased) add_bias(state, walk, parity);
    else if (mode == Mode::kMasked) mask(state, walk, digest, parity);
    if (state.raise(factor)) state.rescale();
    state.take_probabilities(factor);
  }
  // The step is done but for its values, whose buffer this gives.
  HA_DEVICE Place leave(int& left) {
    const Place values = place;
    place.advance();
    finish_step(left);
    return values;
  }

  HA_DEVICE void mask(State& state, const Walk& walk, const Digest& digest, int parity) const {
    constexpr int kNowhere = -2 * kKeys;  // below every bound
    const int column = thread % 4 * 2;
    const int lower = (digest.lower >= 0 ? digest.lower : kNowhere) + column;
    const int upper = (digest.upper >= 0 ? digest.upper : kNowhere) + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const Bounds b = walk.bounds(digest.part, row, block.row(parity, row).far);
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = (i < kKeys / 16 ? lower : upper) + i % (kKeys / 16) * 8 + e;
          if (key < b.low || key >= b.high) state.logits[4 * i + 2 * half + e] = -INFINITY;
        }
    }
  }

  HA_DEVICE void add_bias(State& state, const Walk& walk, int parity) const {
    const int column = thread % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = block.row(parity, row_of(half));
      const float* const bias = block.list_bias(step.slot) + row.query_block * kKeys + column;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) state.logits[4 * i + 2 * half + e] += bias[i * 8 + e];
      if (walk.masks_listed()) {
        const int32_t* const keys = block.list_keys(step.slot) + column;
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (keys[i * 8 + e] >= row.far) state.logits[4 * i + 2 * half + e] = -INFINITY;
      }
    }
  }
};

}  // namespace ha
