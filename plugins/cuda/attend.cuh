// Attention of one tile of 128 query positions over all its parts in one pass (rules 6 to 9, 13 to 16): online softmax in
// registers, m16n8k16 tensor-core products, keys and values through a ring of swizzled buffers filled by cp.async. Four
// warps of 32 rows; every half step (keys, then values) ends one barrier. The exact path is the same walk over one range.
#pragma once
#include "kernels.h"
#include "launch.cuh"
#include "walk.cuh"

namespace ha {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Byte offset of a 16-byte chunk in a tile of rows of D 16-bit elements; the exclusive or spreads ldmatrix over the banks.
template <int D>
HA_DEVICE uint32_t tile_offset(int row, int chunk) {
  return uint32_t(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

// The address 2 k chunks to the right of `address`, which lies in chunk 0 or 1 of its row. Tiles begin at multiples of their
// row size, so the exclusive or reaches the chunk's bits only.
HA_DEVICE uint32_t next_chunks(uint32_t address, int k) { return address ^ uint32_t(k << 5); }

// What one warp keeps in registers: 32 rows as two m16 tiles. In the layout of m16n8k16's accumulator, lane 4 g + t holds
// rows g and g + 8 and columns 2 t and 2 t + 1 of each 16 x 8 tile.
template <class T, int D>
struct WarpState {
  float o[2][D / 8][4];
  float largest[2][2], sum[2][2];        // of each row: running maximum (base 2) and this lane's part of the sum
  float logits[2][kTileKeys / 8][4];     // of the current step
  uint32_t p[2][kTileKeys / 16][4];      // its probabilities as A operand

  HA_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[m][i] = -INFINITY, sum[m][i] = 0.0f;
    }
  }

  template <int kKeys>
  HA_DEVICE void clear_logits() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[m][n][i] = 0.0f;
  }

  // logits += Q K^T for kKeys keys. `queries` and `keys` are shared-memory addresses of the warp's first row of each.
  template <int kKeys>
  HA_DEVICE void multiply_keys(uint32_t queries, uint32_t keys, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    const uint32_t query = queries + tile_offset<D>(matrix % 2 * 8 + row, matrix / 2);
    const uint32_t key = keys + tile_offset<D>(matrix / 2 * 8 + row, matrix % 2);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(a[m], next_chunks(query, k) + m * 16 * D * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, next_chunks(key, k) + n * 16 * D * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(logits[m][2 * n], a[m], b[0], b[1]);
          multiply_add<T>(logits[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Probabilities of the step; `factor` turns logits into base 2.
  template <int kKeys>
  HA_DEVICE void softmax(float factor) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        top = fmaxf(top * factor, largest[m][half]);
        const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen nothing stays at zero, not NaN
        const float keep = exp2_fast(largest[m][half] - base);
        largest[m][half] = top;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            logits[m][n][i] = exp2_fast(fmaf(logits[m][n][i], factor, -base));
            total += logits[m][n][i];
          }
        }
        sum[m][half] = sum[m][half] * keep + total;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) o[m][n][2 * half] *= keep, o[m][n][2 * half + 1] *= keep;
      }
      // Two neighbouring accumulator tiles are one A operand of 16 keys.
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[m][k][i] = pack<T>(logits[m][2 * k + i / 2][i % 2 * 2], logits[m][2 * k + i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  // o += P V; `values` is the shared-memory address of the first value row.
  template <int kKeys>
  HA_DEVICE void multiply_values(uint32_t values, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    const uint32_t value = values + tile_offset<D>(matrix % 2 * 8 + row, matrix / 2);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, next_chunks(value, n) + k * 16 * D * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(o[m][2 * n], p[m][k], b[0], b[1]);
          multiply_add<T>(o[m][2 * n + 1], p[m][k], b[2], b[3]);
        }
      }
    }
  }
};

struct TileArgs {
  HaParams p;
  AttendConfig config;
};

template <class T, int D>
struct AttendTile {
  static constexpr int kBuffers = attend_buffers(D), kChunks = D / 8, kTileBytes = kTileKeys * D * 2;
  static constexpr int kRowBytes = D * 2, kRowsPerPass = kAttendThreads / kChunks;

  const TileArgs& args;
  const Walk& walk;
  const char *k, *v;  // of this batch row and head
  unsigned char* shared;
  uint32_t shared_base;
  int first_position;  // of the tile
  int total, length;   // steps of the walk, valid keys
  float factor;        // turns logits into base 2

  HA_DEVICE Step* step_at(int j) const { return reinterpret_cast<Step*>(shared + args.config.shared.steps) + j % kStepRing; }
  HA_DEVICE Row& row_at(int row) const { return reinterpret_cast<Row*>(shared + args.config.shared.rows)[row]; }
  HA_DEVICE int32_t* list_keys(int j) const {
    return reinterpret_cast<int32_t*>(shared + args.config.shared.keys) + j % kStepRing * kTileKeys;
  }
  HA_DEVICE float* list_bias(int j) const {
    return reinterpret_cast<float*>(shared + args.config.shared.bias) + j % kStepRing * args.config.query_blocks * kTileKeys;
  }
  HA_DEVICE uint32_t buffer(int half_step) const { return shared_base + args.config.shared.ring + half_step % kBuffers * kTileBytes; }

  HA_DEVICE void load_queries(const Geometry& g, const char* q) const {
    const int chunk = thread_index() % kChunks;
    for (int row = thread_index() / kChunks; row < kTileRows; row += kRowsPerPass) {
      const int64_t index = int64_t(first_position) + row - g.first();
      const bool valid = index >= 0 && index < g.seq_q;
      copy_async(shared_base + tile_offset<D>(row, chunk), q + (valid ? index : 0) * kRowBytes + chunk * 16, valid);
    }
  }

  // Step j is described, then its list written, with a barrier between them and before its keys are loaded.
  HA_DEVICE void describe(int j) const {
    if (j < total && thread_index() < kAttendThreads / 32) walk.write_step(j, thread_index(), step_at(j));
  }
  HA_DEVICE void list(int j) const {
    if (j >= total || !step_at(j)->listed()) return;
    constexpr int kStride = kAttendThreads / kTileKeys;
    walk.write_entry(*step_at(j), thread_index() % kTileKeys, thread_index() / kTileKeys, kStride, factor, list_keys(j), list_bias(j));
  }

  // Starts the copy of half step h: keys (even) or values (odd) of step h / 2. Keys past the length are zeros (rule 2).
  HA_DEVICE void load(int h) const {
    const int j = h / 2;
    if (j < total) {
      const Step& step = *step_at(j);
      const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
      const char* const source = (h % 2 ? v : k) + chunk * 16;
      const uint32_t target = buffer(h) + tile_offset<D>(row, chunk);
      constexpr int kPasses = kTileKeys / kRowsPerPass, kHalf = kTileKeys / 2;
      const int lower = step.lower, upper = step.upper;
      if (step.listed()) {
        const int32_t* const keys = list_keys(j) + row;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          const int key = keys[i * kRowsPerPass];
          copy_async(target + i * kRowsPerPass * kRowBytes, source + int64_t(max(key, 0)) * kRowBytes, key >= 0);
        }
      } else if (min(lower, upper) >= 0 && max(lower, upper) + kHalf <= length) {
        const char* const starts[2] = {source + int64_t(lower + row) * kRowBytes, source + int64_t(upper + row) * kRowBytes};
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
          copy_async(target + i * kRowsPerPass * kRowBytes, starts[i / (kPasses / 2)] + i % (kPasses / 2) * kRowsPerPass * kRowBytes, true);
      } else {
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          const int start = i < kPasses / 2 ? lower : upper, key = start + row + i % (kPasses / 2) * kRowsPerPass;
          const bool valid = start >= 0 && key < length;
          copy_async(target + i * kRowsPerPass * kRowBytes, source + int64_t(valid ? key : 0) * kRowBytes, valid);
        }
      }
    }
    copy_commit();
  }

  // What a step's logits start from: zero, -inf where a row does not see a key, or the list's biases. Masking the
  // accumulator before the product costs no register beyond it.
  template <int kKeys>
  HA_DEVICE void start_logits(WarpState<T, D>& state, int j, Mode mode, int warp, int lane) const {
    const Step& step = *step_at(j);
    const int start = (kKeys < kTileKeys && warp >= kAttendThreads / 64 ? step.upper : step.lower) + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = warp * kWarpRows + m * 16 + half * 8 + lane / 4;
        const Row row = row_at(index);
        if (kKeys == kTileKeys && mode == Mode::kBiased) {
          const float* const bias = list_bias(j) + row.query_block * kTileKeys + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < kKeys / 4; ++i) state.logits[m][i / 2][2 * half + i % 2] = bias[i / 2 * 8 + i % 2];
        } else {
          const Bounds b = walk.bounds(step.part, first_position + index, row.far);
#pragma unroll
          for (int i = 0; i < kKeys / 4; ++i) {
            const int key = start + i / 2 * 8 + i % 2;
            state.logits[m][i / 2][2 * half + i % 2] = key >= b.low && key < b.high ? 0.0f : -INFINITY;
          }
        }
      }
    }
  }

  // One step: scores and probabilities, then values, each behind its barrier. kKeys < kTileKeys: a pair.
  template <int kKeys>
  HA_DEVICE void run_step(WarpState<T, D>& state, int j, int warp, int lane) const {
    const uint32_t offset = kKeys == kTileKeys ? 0 : uint32_t(warp / 2 * kKeys * kRowBytes);
    const Mode mode = step_at(j)->modes[warp];

    load(2 * j + kBuffers - 1);
    if (mode != Mode::kSkip) {
      if (mode == Mode::kPlain) state.template clear_logits<kKeys>();
      else start_logits<kKeys>(state, j, mode, warp, lane);
      state.template multiply_keys<kKeys>(shared_base + warp * kWarpRows * kRowBytes, buffer(2 * j) + offset, lane);
      state.template softmax<kKeys>(factor);
    }

    copy_wait<kBuffers - 2>();
    sync_block();
    load(2 * j + kBuffers);
    if (mode != Mode::kSkip) state.template multiply_values<kKeys>(buffer(2 * j + 1) + offset, lane);
  }

  // Divides by the sums and writes O and LSE; O passes through the warp's own query rows to leave in 16-byte pieces.
  HA_DEVICE void store(WarpState<T, D>& state, const Geometry& g, int64_t slice, int warp, int lane) const {
    const int position = first_position + warp * kWarpRows;
    unsigned char* const staged = shared + warp * kWarpRows * D * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = state.sum[m][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int row = m * 16 + half * 8 + lane / 4;
        const int64_t index = position + row - g.first();
        if (args.p.lse && lane % 4 == 0 && index >= 0 && index < g.seq_q)
          args.p.lse[slice * g.seq_q + index] = total == 0.0f ? -INFINITY : (state.largest[m][half] + log2f(total)) * kLn2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
          *reinterpret_cast<uint32_t*>(staged + tile_offset<D>(row, n) + lane % 4 * 4) =
              pack<T>(state.o[m][n][2 * half] * inverse, state.o[m][n][2 * half + 1] * inverse);
      }
    }
    sync_warp();
    char* const out = static_cast<char*>(args.p.out) + slice * g.seq_q * D * 2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = i * (32 / kChunks) + lane / kChunks, chunk = lane % kChunks;
      const int64_t index = position + row - g.first();
      if (index >= 0 && index < g.seq_q)
        *reinterpret_cast<Words4*>(out + (index * D + chunk * 8) * 2) = *reinterpret_cast<const Words4*>(staged + tile_offset<D>(row, chunk));
    }
  }
};

template <class T, int D>
HA_KERNEL(kAttendThreads, D == 64 ? 3 : 2) attend_kernel(const HA_CONSTANT TileArgs args) {
  using Tile = AttendTile<T, D>;
  const Geometry g(args.p);
  const int64_t tile_index = args.config.tiles - 1 - block_index() % args.config.tiles;  // causal: the longest first
  const int64_t slice = block_index() / args.config.tiles, batch = slice / g.heads_q, head = slice % g.heads_q;
  const int64_t kv_slice = batch * g.heads_kv + head / g.group();
  const int warp = thread_index() / 32, lane = thread_index() % 32;

  static_assert(sizeof(Walk) <= kWalkBytes && sizeof(Step) == kStepBytes);
  unsigned char* const shared = shared_memory();
  Walk& walk = *reinterpret_cast<Walk*>(shared + args.config.shared.walk);
  const int64_t kv_start = kv_slice * g.seq_k * D * 2;
  Tile tile{args,
                  walk,
                  static_cast<const char*>(args.p.k) + kv_start,
                  static_cast<const char*>(args.p.v) + kv_start,
                  shared,
                  shared_address(shared),
                  int((args.config.first_tile + tile_index) * kTileRows),
                  0,
                  int(g.length(args.p.lengths, batch)),
                  (g.a.scale > 0.0f ? g.a.scale : 1.0f / sqrtf(float(D))) * kLog2E};
  tile.load_queries(g, static_cast<const char*>(args.p.q) + slice * g.seq_q * D * 2);
  if (thread_index() == 0) {
    walk.chosen = reinterpret_cast<int32_t*>(shared + args.config.shared.chosen);
    walk.counts = reinterpret_cast<int32_t*>(shared + args.config.shared.counts);
    walk.start(args.p, args.config, g, tile.first_position, batch, head);
  }
  sync_block();
  static_assert(kAttendThreads == kTileRows && sizeof(Row) == kRowInfoBytes);
  tile.row_at(thread_index()) = walk.row(tile.first_position + thread_index());
  if (thread_index() < args.config.query_blocks) walk.read_plan(g, args.p.plan, slice, thread_index());
  sync_block();
  if (thread_index() == 0) walk.plan_steps(g);
  sync_block();

  tile.total = walk.total;
  for (int j = 0; j < 3; ++j) tile.describe(j);
  sync_block();
  for (int j = 0; j < 2; ++j) tile.list(j);
  sync_block();
  for (int h = 0; h < Tile::kBuffers - 1; ++h) tile.load(h);

  WarpState<T, D> state;
  state.clear();
  for (int j = 0; j < tile.total; ++j) {
    // Here, where no logits and probabilities fill the registers.
    tile.describe(j + 3);
    tile.list(j + 2);
    copy_wait<Tile::kBuffers - 2>();
    sync_block();
    if (tile.step_at(j)->part == Part::kPair)
      tile.template run_step<kTileKeys / 2>(state, j, warp, lane);
    else
      tile.template run_step<kTileKeys>(state, j, warp, lane);
  }
  copy_wait<0>();
  sync_block();
  tile.store(state, g, slice, warp, lane);
}

template <class T, int D>
void launch_attend(const AttendArgs& args) {
  const Geometry g(args.p);
  const TileArgs tile{args.p, attend_config(g)};
  launch<attend_kernel<T, D>>(g.batch * g.heads_q * tile.config.tiles, kAttendThreads, size_t(tile.config.shared.bytes), args.p.stream, tile);
}

}  // namespace ha
