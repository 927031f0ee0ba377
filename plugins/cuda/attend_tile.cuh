// One tile of query rows in shared memory: queries, a ring of swizzled buffers that keys and values pass through, filled by cp.async,
// and what the walk says of the next steps.
#pragma once
#include "warp_state.cuh"

namespace ha {

struct TileArgs {
  HaParams p;
  float* lse;
  AttendConfig config;
};

// Threads read and write rows of 16-byte chunks: kLaneChunks neighbouring threads a row, kColumns chunks each. Chunks past the
// head size are zeros in shared memory.
template <class T, int P>
struct Chunks {
  using S = Shape<T, P>;
  static constexpr int kPowerOfTwo = S::kChunks & -S::kChunks;
  static constexpr int kLaneChunks = kPowerOfTwo < 32 ? kPowerOfTwo : 32, kColumns = S::kChunks / kLaneChunks;
  static constexpr int kRowsPerPass = S::kThreads / kLaneChunks;
  static_assert(kRowsPerPass % 4 == 0 && S::kKeys / 2 % kRowsPerPass == 0 && (kRowsPerPass % 8 == 0 || kSwizzle<S::kRowBytes> == 7));

  // From the offset of a chunk in row r < kRowsPerPass, where rows of the first pass do not pass a multiple of eight, to that of row
  // r + pass kRowsPerPass and `column` groups of kLaneChunks to the right.
  HA_DEVICE static uint32_t advance(uint32_t offset, int pass, int column) {
    const uint32_t turned = kRowsPerPass % 8 && pass % 2 ? offset ^ 64u : offset;
    return turned + uint32_t(pass * kRowsPerPass * S::kRowBytes + column * kLaneChunks * 16);
  }
};

template <class T, int P, class Walk>
struct AttendTile {
  using S = Shape<T, P>;
  using C = Chunks<T, P>;
  static constexpr int kBuffers = S::kBuffers, kKeys = S::kKeys, kRowBytes = S::kRowBytes;

  const TileArgs& args;
  const Walk& walk;
  const char *k, *v;  // of this batch row and head
  unsigned char* shared;
  uint32_t shared_base;
  int k_row, v_row;    // bytes of a row
  int total, length;   // steps of the walk, valid keys
  float factor;        // turns logits into base 2

  HA_DEVICE Step* step_at(int j) const { return reinterpret_cast<Step*>(shared + args.config.shared.steps) + j % kStepRing; }
  HA_DEVICE Row& row_at(int row) const { return reinterpret_cast<Row*>(shared + args.config.shared.rows)[row]; }
  HA_DEVICE int32_t* list_keys(int j) const {
    return reinterpret_cast<int32_t*>(shared + args.config.shared.keys) + j % kStepRing * kKeys;
  }
  HA_DEVICE float* list_bias(int j) const {
    return reinterpret_cast<float*>(shared + args.config.shared.bias) + j % kStepRing * args.config.query_blocks * kKeys;
  }
  HA_DEVICE uint32_t buffer(int half_step) const {
    return shared_base + args.config.shared.ring + half_step % kBuffers * (kKeys * kRowBytes);
  }

  // `q` = of this batch row and head; index_of(row of the tile) = its row index, -1 = none.
  template <class IndexOf>
  HA_DEVICE void load_queries(const char* q, IndexOf index_of) const {
    const int chunk = thread_index() % C::kLaneChunks;
    for (int row = thread_index() / C::kLaneChunks; row < S::kTileRows; row += C::kRowsPerPass) {
      const int index = index_of(row);
      const char* const source = q + int64_t(max(index, 0)) * k_row;
#pragma unroll
      for (int c = 0; c < C::kColumns; ++c) {
        const int at = (chunk + c * C::kLaneChunks) * 16;
        const bool inside = at < k_row;
        copy_async(shared_base + tile_offset<kRowBytes>(row, at / 16), source + (inside ? at : 0), inside && index >= 0);
      }
    }
  }

  // Step j is described, then its list written, with a barrier between them and before its keys are loaded.
  HA_DEVICE void describe(int j) const {
    if (j < total && thread_index() < S::kWarps) write_step(walk, j, thread_index(), step_at(j));
  }
  HA_DEVICE void list(int j) const {
    if (j >= total || (Walk::kConsecutive && !step_at(j)->listed())) return;
    constexpr int kStride = S::kThreads / kKeys;
    const int q0 = thread_index() / kKeys;
    const int slot = thread_index() % kKeys;
    if (q0 < args.config.query_blocks)
      walk.write_entry(*step_at(j), walk.find_entry(*step_at(j), slot), slot, q0, kStride, factor, list_keys(j), list_bias(j));
  }

  // Starts the copy of half step h: keys (even) or values (odd) of step h / 2. Keys past the length are zeros (rule 2).
  HA_DEVICE void load(int h) const {
    const int j = h / 2;
    if (j < total) {
      const Step& step = *step_at(j);
      const int row = thread_index() / C::kLaneChunks, chunk = thread_index() % C::kLaneChunks;
      const int row_bytes = h % 2 ? v_row : k_row;
      const char* const source = h % 2 ? v : k;
      const uint32_t target = buffer(h) + tile_offset<kRowBytes>(row, chunk);
      constexpr int kPasses = kKeys / C::kRowsPerPass, kHalf = kKeys / 2;
      const int lower = step.lower, upper = step.upper;
#pragma unroll
      for (int c = 0; c < C::kColumns; ++c) {
        const int at = (chunk + c * C::kLaneChunks) * 16;
        const bool inside = at < row_bytes;
        const char* const column = source + (inside ? at : 0);
        if (!Walk::kConsecutive || step.listed()) {
          const int32_t* const keys = list_keys(j) + row;
#pragma unroll
          for (int i = 0; i < kPasses; ++i) {
            const int key = keys[i * C::kRowsPerPass];
            copy_async(C::advance(target, i, c), column + int64_t(max(key, 0)) * row_bytes, inside && key >= 0);
          }
        } else if (min(lower, upper) >= 0 && max(lower, upper) + kHalf <= length) {
          const char* const starts[2] = {column + int64_t(lower + row) * row_bytes, column + int64_t(upper + row) * row_bytes};
#pragma unroll
          for (int i = 0; i < kPasses; ++i)
            copy_async(C::advance(target, i, c), starts[i / (kPasses / 2)] + i % (kPasses / 2) * C::kRowsPerPass * row_bytes, inside);
        } else {
#pragma unroll
          for (int i = 0; i < kPasses; ++i) {
            const int start = i < kPasses / 2 ? lower : upper, key = start + row + i % (kPasses / 2) * C::kRowsPerPass;
            const bool valid = start >= 0 && key < length;
            copy_async(C::advance(target, i, c), column + int64_t(valid ? key : 0) * row_bytes, inside && valid);
          }
        }
      }
    }
    copy_commit();
  }

  // What a step's logits start from: zero, -inf where a row does not see a key, or the list's biases. Masking the
  // accumulator before the product costs no register beyond it.
  template <int kStepKeys>
  HA_DEVICE void start_logits(WarpState<T, P>& state, int j, Mode mode, int warp, int lane) const {
    const Step& step = *step_at(j);
    const int start = (kStepKeys < kKeys && warp >= S::kWarps / 2 ? step.upper : step.lower) + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < WarpState<T, P>::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = warp * S::kWarpRows + m * 16 + half * 8 + lane / 4;
        const Row row = row_at(index);
        if (!Walk::kConsecutive || (kStepKeys == kKeys && mode == Mode::kBiased)) {
          const float* const bias = list_bias(j) + row.query_block * kKeys + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < kStepKeys / 4; ++i) state.logits[m][i / 2][2 * half + i % 2] = bias[i / 2 * 8 + i % 2];
          if (!Walk::kConsecutive && walk.masks_listed()) {
            const int32_t* const keys = list_keys(j) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < kStepKeys / 4; ++i)
              if (keys[i / 2 * 8 + i % 2] >= row.far) state.logits[m][i / 2][2 * half + i % 2] = -INFINITY;
          }
        } else if constexpr (Walk::kConsecutive) {
          const Bounds b = walk.bounds(step.part, index, row.far);
#pragma unroll
          for (int i = 0; i < kStepKeys / 4; ++i) {
            const int key = start + i / 2 * 8 + i % 2;
            state.logits[m][i / 2][2 * half + i % 2] = key >= b.low && key < b.high ? 0.0f : -INFINITY;
          }
        }
      }
    }
  }

  // One step: scores and probabilities, then values, each behind its barrier. kStepKeys < kKeys: a pair.
  template <int kStepKeys>
  HA_DEVICE void run_step(WarpState<T, P>& state, int j, int warp, int lane) const {
    const uint32_t offset = kStepKeys == kKeys ? 0 : uint32_t(warp / (S::kWarps / 2) * kStepKeys * kRowBytes);
    const Mode mode = step_at(j)->modes[warp];

    load(2 * j + kBuffers - 1);
    if (mode != Mode::kSkip) {
      if (Walk::kConsecutive && mode == Mode::kPlain) state.template clear_logits<kStepKeys>();
      else start_logits<kStepKeys>(state, j, mode, warp, lane);
      state.template multiply_keys<kStepKeys>(shared_base + warp * S::kWarpRows * kRowBytes, buffer(2 * j) + offset, lane);
      state.template softmax<kStepKeys>(factor);
    }

    copy_wait<kBuffers - 2>();
    sync_block();
    load(2 * j + kBuffers);
    if (mode != Mode::kSkip) state.template multiply_values<kStepKeys>(buffer(2 * j + 1) + offset, lane);
  }

  // What the rows have seen in earlier launches: one key with the stored output as its value. `slice` = batch row and head.
  HA_DEVICE void load_state(WarpState<T, P>& state, int64_t slice, int warp, int lane) const {
#pragma unroll
    for (int m = 0; m < WarpState<T, P>::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row row = row_at(warp * S::kWarpRows + m * 16 + half * 8 + lane / 4);
        if (row.index < 0 || !row.stored) continue;
        const int64_t at = slice * args.p.seq_q + row.index;
        const T* const out = static_cast<const T*>(args.p.out) + at * args.p.head_dim_v + lane % 4 * 2;
        const float lse = args.lse[at];
        if (lse == -INFINITY) continue;
        state.largest[m][half] = lse * kLog2E;
        state.sum[m][half] = lane % 4 == 0;
#pragma unroll
        for (int n = 0; n < P / 8; ++n) {
          if (n * 8 < args.p.head_dim_v) load_pair(out + n * 8, state.o[m][n][2 * half], state.o[m][n][2 * half + 1]);
        }
      }
    }
  }

  // Divides by the sums and writes O and LSE; O passes through the warp's own query rows to leave in 16-byte pieces.
  HA_DEVICE void store(WarpState<T, P>& state, int64_t slice, int warp, int lane) const {
    unsigned char* const staged = shared + warp * S::kWarpRows * kRowBytes;
#pragma unroll
    for (int m = 0; m < WarpState<T, P>::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = state.sum[m][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int row = m * 16 + half * 8 + lane / 4, index = row_at(warp * S::kWarpRows + row).index;
        if (args.lse && lane % 4 == 0 && index >= 0)
          args.lse[slice * args.p.seq_q + index] = total == 0.0f ? -INFINITY : (state.largest[m][half] + log2f(total)) * kLn2;
#pragma unroll
        for (int n = 0; n < P / 8; ++n)
          stage(staged, row, n, lane, state.o[m][n][2 * half] * inverse, state.o[m][n][2 * half + 1] * inverse);
      }
    }
    sync_warp();
    char* const out = static_cast<char*>(args.p.out) + slice * args.p.seq_q * v_row;
    constexpr int kRows = 32 / C::kLaneChunks;
#pragma unroll
    for (int i = 0; i < S::kWarpRows / kRows; ++i) {
      const int row = i * kRows + lane / C::kLaneChunks, index = row_at(warp * S::kWarpRows + row).index;
#pragma unroll
      for (int c = 0; c < C::kColumns; ++c) {
        const int chunk = lane % C::kLaneChunks + c * C::kLaneChunks;
        if (index >= 0 && chunk * 16 < v_row)
          *reinterpret_cast<Words4*>(out + int64_t(index) * v_row + chunk * 16) =
              *reinterpret_cast<const Words4*>(staged + tile_offset<kRowBytes>(row, chunk));
      }
    }
  }

 private:
  // Two elements that lie at a multiple of their size.
  HA_DEVICE static void load_pair(const T* source, float& x, float& y) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(source);
      x = to_float(T{uint16_t(word)});
      y = to_float(T{uint16_t(word >> 16)});
    } else {
      x = source[0];
      y = source[1];
    }
  }

  // Columns 8 n + 2 (lane % 4) and the next one of a staged row.
  HA_DEVICE static void stage(unsigned char* staged, int row, int n, int lane, float x, float y) {
    const int byte = n * 8 * int(sizeof(T)) + lane % 4 * 2 * int(sizeof(T));
    unsigned char* const target = staged + tile_offset<kRowBytes>(row, byte / 16) + byte % 16;
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(target) = pack<T>(x, y);
    } else {
      reinterpret_cast<float*>(target)[0] = x;
      reinterpret_cast<float*>(target)[1] = y;
    }
  }
};

}  // namespace ha
