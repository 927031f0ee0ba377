// A warp group that computes two pieces of a node's tile, 64 query rows each: a step's keys and values serve one after the other. Products
// of one piece's keys and of the other's values run together, maxima are sought while the latter run. What is kept of the rows of the piece
// that has no turn waits in registers.
#pragma once
#include "sm90_state.cuh"
#include "sm90_store.cuh"
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct NodeWorker : RingReader<HopperBlock<T, P, Walk>> {
  using Block = HopperBlock<T, P, Walk>;
  using Reader = RingReader<Block>;
  using Reader::block, Reader::thread, Reader::place, Reader::step, Reader::await_keys, Reader::release_buffer, Reader::finish_step;
  using State = GroupState<T, P, Block::kKeys, Block::kRows>;
  using Place = RingPlace<Block::kBuffers>;
  static constexpr int kKeys = Block::kKeys, kGroups = Block::kTable.groups, kPieces = Block::kPieces;
  static constexpr int kPieceBytes = kGroups * kGroupRows * 128;  // from one piece's queries to the next: groups alternate
  // Whether maxima are sought in every step, while the values' product runs: up to 64 they cost nothing there.
  static constexpr bool kSeeks = P == 64;
  static constexpr int kSeen = P == 64 ? kPieces : 1;  // pieces for which registers suffice
  static_assert(!Walk::kConsecutive && kGroups == 2 && kPieces == 2);

  const Geometry& g;
  int group;  // of the block's working groups

  HA_DEVICE void start() const {}

  HA_DEVICE void run(int turn, int64_t) {
    const int parity = turn & 1;
    const Walk& walk = block.walk(parity);
    barrier_wait(block.tile_ready(parity), turn >> 1 & 1);
    barrier_wait(block.queries_ready(turn), Block::queries_phase(turn));
    fence_products();
    const int total = walk.total;
    if (total < 0) {  // no tile: its rows are left as they are
      release(block.queries_free(turn), thread);
      barrier_arrive(block.tile_done(parity));
      return;
    }
    const int64_t slice = walk.slice;
    if (block.args.config.attend.stored) prefetch_row(block.args, slice, block.row(parity, group * (Block::kRows / kGroups) + thread));
    const float factor = base2_factor(g);
    const uint32_t queries = block.queries(turn) + group * kGroupRows * 128;
    State state;  // at a step's start with the last piece's rows, whose values come next
    state.clear();
    state.clear_step();
    Rows waiting;
    waiting.clear();
    int left = total;
    Place values = place;
    bool pending = false;  // the last piece's values of the step before have yet to be added
    while (left > 0) {
      const Digest digest = await_keys();
      fence_products();  // gathered by other threads
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        const bool biased = digest.mode(piece_of(u)) != Mode::kPlain;  // a piece without rows has its biases, too
        if (biased) take_bias(state, parity, u);
        const Place before = u == 0 ? values : following();
        state.start_keys(uniform(queries) + u * kPieceBytes, uniform(block.buffer(place.index)), biased);
        if (u > 0 || pending) {
          barrier_wait(block.full(before.index), before.phase);
          if (u > 0) fence_products();
          state.start_values(uniform(block.buffer(before.index)));
        } else {
          product_commit();  // nothing, so that there are two groups to wait for
        }
        product_wait<1>();
        waiting.exchange_sums(state);
        fence_registers(state.logits);
        if (u == kPieces - 1) release_buffer();
        if (biased && walk.masks_listed()) mask_listed(state, parity, u);
        if (!pending) state.refer(factor);
        const auto values_done = [&] {
          product_wait<0>();
          fence_registers(state.o);
          if (u == 0 && pending) release(block.free(values.index), thread);
          waiting.exchange_output(state);
        };
        if constexpr (kSeeks) {
          const bool rises = state.raise(factor);
          values_done();
          if (rises) state.rescale();
          state.take_probabilities(factor);
        } else {
          state.template take_probabilities<false>(factor, values_done);
        }
      }
      values = place;
      place.advance();
      finish_step(left);
      pending = true;
    }
    release(block.queries_free(turn), thread);
    if (block.args.config.attend.stored) finish<true>(state, waiting, pending, values, parity, slice);
    else finish<false>(state, waiting, pending, values, parity, slice);
    barrier_arrive(block.tile_done(parity));
  }

 private:
  // What a piece's rows keep from one step to the next, as in GroupState.
  struct Rows {
    float o[P / 2], largest[2], sum[2];

    HA_DEVICE void clear() {
#pragma unroll
      for (int i = 0; i < P / 2; ++i) o[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[i] = -INFINITY, sum[i] = 0.0f;
    }
    // Change places with those in `state`; while a product adds to these, their sums only.
    HA_DEVICE void exchange_output(State& state) {
#pragma unroll
      for (int i = 0; i < P / 2; ++i) swap(o[i], state.o[i]);
    }
    HA_DEVICE void exchange_sums(State& state) {
#pragma unroll
      for (int i = 0; i < 2; ++i) swap(largest[i], state.largest[i]), swap(sum[i], state.sum[i]);
    }
    HA_DEVICE static void swap(float& x, float& y) {
      const float kept = x;
      x = y;
      y = kept;
    }
  };

  // Adds the last piece's last values, where they are `pending`, and stores the rows: the first piece's meanwhile. kStored: some have met
  // keys in earlier launches.
  template <bool kStored>
  HA_DEVICE void finish(State& state, Rows& waiting, bool pending, const Place& values, int parity, int64_t slice) const {
    if (pending) {
      const auto first = look_up<kStored>(parity, 0, slice);
      PieceRows<kStored> last;
      if (kSeen > 1) last = look_up<kStored>(parity, 1, slice);
      barrier_wait(block.full(values.index), values.phase);
      state.start_values(uniform(block.buffer(values.index)));
      store_rows<T, P, kStored>(block.args, waiting, thread, slice, first.row);
      if (kSeen == 1) last = look_up<kStored>(parity, 1, slice);
      product_wait<0>();
      fence_registers(state.o);
      release(block.free(values.index), thread);
      store_rows<T, P, kStored>(block.args, state, thread, slice, last.row);
    } else {
      store_rows<T, P, kStored>(block.args, waiting, thread, slice, look_up<kStored>(parity, 0, slice).row);
      store_rows<T, P, kStored>(block.args, state, thread, slice, look_up<kStored>(parity, 1, slice).row);
    }
  }

  // A thread's rows of a piece, with what earlier launches have stored of them.
  template <bool kStored>
  struct PieceRows {
    std::conditional_t<kStored, SeenRow<P>, Row> row[2];
  };
  template <bool kStored>
  HA_DEVICE PieceRows<kStored> look_up(int parity, int u, int64_t slice) const {
    PieceRows<kStored> rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row& row = block.row(parity, row_of(u, half));
      if constexpr (kStored) rows.row[half] = fetch_row<P>(block.args, thread, slice, row);
      else rows.row[half] = row;
    }
    return rows;
  }
  // Piece u of the group, counted from the tile's first.
  HA_DEVICE int piece_of(int u) const { return u * kGroups + group; }
  HA_DEVICE int row_of(int u, int half) const { return piece_of(u) * kGroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half; }

  // The buffer behind the current one: of a step's values, while it is with its keys.
  HA_DEVICE Place following() const {
    Place values = place;
    values.advance();
    return values;
  }

  // Two neighbouring columns of a list.
  struct alignas(8) Pair {
    float bias[2];
  };
  // The logits start from biases.
  HA_DEVICE void take_bias(State& state, int parity, int u) const {
    const float* const bias = block.list_bias(step.slot) + thread % 4 * 2;
    if (block.args.config.attend.query_blocks == 1) {  // one list for all rows
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const Pair pair = *reinterpret_cast<const Pair*>(bias + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) state.logits[4 * i + k] = pair.bias[k % 2];
      }
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_block = block.row(parity, row_of(u, half)).query_block;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const Pair pair = *reinterpret_cast<const Pair*>(bias + query_block * kKeys + i * 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) state.logits[4 * i + 2 * half + e] = pair.bias[e];
      }
    }
  }
  // Rows see no listed keys that are local to them.
  HA_DEVICE void mask_listed(State& state, int parity, int u) const {
    const int32_t* const keys = block.list_keys(step.slot) + thread % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int far = block.row(parity, row_of(u, half)).far;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (keys[i * 8 + e] >= far) state.logits[4 * i + 2 * half + e] = -INFINITY;
    }
  }
};

}  // namespace ha
