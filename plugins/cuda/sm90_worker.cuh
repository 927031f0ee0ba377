// A warp group that computes: 64 query rows of each tile. While the tensor cores add one step's values, the group takes the softmax of the
// next step's logits.
#pragma once
#include "sm90_state.cuh"
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P, class Walk>
struct Worker {
  using Block = HopperBlock<T, P, Walk>;
  using State = GroupState<T, P>;

  Block& block;
  const Geometry& g;
  int group, thread;          // of the block's working groups, of the group
  int buffer = 0, phase = 0;  // of the ring

  HA_DEVICE void run(int64_t turn, int64_t slice) {
    const int parity = int(turn & 1);
    const Walk& walk = block.walk(parity);
    barrier_wait(block.queries_ready(), parity);
    if (!Walk::kConsecutive) fence_products();
    const int total = walk.total;
    if (total < 0) {  // no tile: its rows are left as they are
      release(block.queries_free());
      release(block.tile_done(parity));
      return;
    }
    const float factor = block.factor(g);
    const uint32_t queries = block.queries() + group * 64 * 128;
    State state;
    state.clear();
    if (block.args.config.attend.stored) load_state(state, parity, slice);

    int j = 0;
    if (next(j, total)) {
      state.start_keys(queries, block.buffer(buffer));
      product_wait<0>();
      finish_keys(state, walk, parity, factor);
      state.take_probabilities();
      Values values = leave(walk, j);
      while (next(j, total)) {
        state.start_keys(queries, block.buffer(buffer));
        values.wait(block);
        state.start_values(block.buffer(values.buffer));
        product_wait<1>();
        finish_keys(state, walk, parity, factor);
        product_wait<0>();
        finish_values(state, values);
        state.take_probabilities();
        values = leave(walk, j);
      }
      release(block.queries_free());
      values.wait(block);
      state.start_values(block.buffer(values.buffer));
      product_wait<0>();
      finish_values(state, values);
    } else {
      release(block.queries_free());
    }
    store(state, parity, slice);
    release(block.tile_done(parity));
  }

 private:
  // The buffer of a step's values.
  struct Values {
    int buffer, phase;
    bool gathered;
    HA_DEVICE void wait(const Block& block) const {
      barrier_wait(block.full(buffer), phase);
      if (gathered) fence_products();
    }
  };

  HA_DEVICE int row_of(int half) const { return group * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
  HA_DEVICE void advance() {
    if (++buffer == Block::kBuffers) buffer = 0, phase ^= 1;
  }
  // Once a warp.
  HA_DEVICE void release(uint32_t barrier) const {
    sync_warp();
    if (thread % 32 == 0) barrier_arrive(barrier);
  }

  // Waits for the keys of the next step that the group takes part in; steps of another group's pairs are passed over. Between two of
  // the group's own there is at most one of those, so that a buffer is never waited for that cannot be filled.
  HA_DEVICE bool next(int& j, int total) {
    if (j >= total) return false;
    barrier_wait(block.full(buffer), phase);
    if (Walk::kConsecutive && block.step()->modes[group] == Mode::kSkip) {
      release(block.free(buffer));
      advance();
      barrier_wait(block.full(buffer), phase);
      release(block.free(buffer));
      advance();
      block.next_step();
      if (++j >= total) return false;
      barrier_wait(block.full(buffer), phase);
    }
    return true;
  }

  // The step is done but for its values.
  HA_DEVICE Values leave(const Walk& walk, int& j) {
    advance();
    const Values values{buffer, phase, block.gathers(*block.step(), walk.length, int(g.seq_k))};
    advance();
    block.next_step();
    ++j;
    return values;
  }

  HA_DEVICE void finish_values(State& state, const Values& values) const {
    fence_registers(state.o);
    release(block.free(values.buffer));
  }

  // From the products to probabilities.
  HA_DEVICE void finish_keys(State& state, const Walk& walk, int parity, float factor) const {
    fence_registers(state.logits);
    release(block.free(buffer));
    const Step& step = *block.step();
    const Mode mode = Walk::kConsecutive ? step.modes[group] : Mode::kBiased;
    if (mode == Mode::kBiased) add_bias(state, walk, parity);
    else if (mode == Mode::kMasked) mask(state, walk, step, parity);
    state.softmax(factor);
  }

  HA_DEVICE void mask(State& state, const Walk& walk, const Step& step, int parity) const {
    if constexpr (Walk::kConsecutive) {
      constexpr int kNowhere = -2 * kHopperKeys;  // below every bound
      const int column = thread % 4 * 2;
      const int lower = (step.lower >= 0 ? step.lower : kNowhere) + column, upper = (step.upper >= 0 ? step.upper : kNowhere) + column;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(half);
        const Bounds b = walk.bounds(step.part, row, block.row(parity, row).far);
#pragma unroll
        for (int i = 0; i < kHopperKeys / 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = (i < kTileKeys / 8 ? lower : upper) + i % (kTileKeys / 8) * 8 + e;
            if (key < b.low || key >= b.high) state.logits[4 * i + 2 * half + e] = -INFINITY;
          }
      }
    }
  }

  HA_DEVICE void add_bias(State& state, const Walk& walk, int parity) const {
    const int column = thread % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = block.row(parity, row_of(half));
      const float* const bias = block.list_bias() + row.query_block * kHopperKeys + column;
#pragma unroll
      for (int i = 0; i < kHopperKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) state.logits[4 * i + 2 * half + e] += bias[i * 8 + e];
      if (walk.masks_listed()) {
        const int32_t* const keys = block.list_keys() + column;
#pragma unroll
        for (int i = 0; i < kHopperKeys / 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (keys[i * 8 + e] >= row.far) state.logits[4 * i + 2 * half + e] = -INFINITY;
      }
    }
  }

  // What the rows have seen in earlier launches: one key with the stored output as its value. `slice` = batch row and head.
  HA_DEVICE void load_state(State& state, int parity, int64_t slice) const {
    const HopperArgs& args = block.args;
    const int v_row = int(args.p.head_dim_v) * 2, t = thread % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = block.row(parity, row_of(half));
      const int64_t at = slice * args.p.seq_q + row.index;
      const float lse = row.index >= 0 && row.stored ? args.lse[at] : -INFINITY;
      const bool seen = lse != -INFINITY;
      if (seen) {
        state.largest[half] = lse * kHopperLog2E;
        state.sum[half] = t == 0;
      }
      const char* const out = static_cast<const char*>(args.p.out) + (seen ? at : 0) * v_row;
#pragma unroll
      for (int m = 0; m < P / 32; ++m) {
        const int byte = (4 * m + t) * 16;
        Words4 piece{};
        if (seen && byte < v_row) piece = *reinterpret_cast<const Words4*>(out + byte);
        transpose_quad(piece.w, thread);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state.o[(4 * m + i) * 4 + 2 * half] = to_float(T{uint16_t(piece.w[i])});
          state.o[(4 * m + i) * 4 + 2 * half + 1] = to_float(T{uint16_t(piece.w[i] >> 16)});
        }
      }
    }
  }

  // Divides by the sums and writes O and LSE.
  HA_DEVICE void store(State& state, int parity, int64_t slice) const {
    const HopperArgs& args = block.args;
    const int v_row = int(args.p.head_dim_v) * 2, t = thread % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = state.sum[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      const int index = block.row(parity, row_of(half)).index;
      const int64_t at = slice * args.p.seq_q + index;
      if (args.lse && t == 0 && index >= 0) args.lse[at] = total == 0.0f ? -INFINITY : (state.largest[half] + log2f(total)) * kHopperLn2;
      char* const out = static_cast<char*>(args.p.out) + at * v_row;
#pragma unroll
      for (int m = 0; m < P / 32; ++m) {
        Words4 piece;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          piece.w[i] = pack<T>(state.o[(4 * m + i) * 4 + 2 * half] * inverse, state.o[(4 * m + i) * 4 + 2 * half + 1] * inverse);
        transpose_quad(piece.w, thread);
        const int byte = (4 * m + t) * 16;
        if (index >= 0 && byte < v_row) *reinterpret_cast<Words4*>(out + byte) = piece;
      }
    }
  }
};

}  // namespace ha
