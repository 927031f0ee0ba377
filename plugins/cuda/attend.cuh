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

  // logits = Q K^T for kKeys keys. `queries` and `keys` are shared-memory addresses of the warp's first row of each.
  template <int kKeys>
  HA_DEVICE void multiply_keys(uint32_t queries, uint32_t keys, int lane) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[m][n][i] = 0.0f;
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

template <class T, int D>
struct AttendTile {
  static constexpr int kBuffers = attend_buffers(D), kChunks = D / 8, kTileBytes = kTileKeys * D * 2;
  static constexpr int kWarpRows = 32;

  const AttendArgs& args;
  const Walk& walk;
  const char *k, *v;  // of this batch row and head
  unsigned char* shared;
  uint32_t shared_base;
  int first_position;  // of the tile

  HA_DEVICE int32_t* list_keys(int j) const {
    return reinterpret_cast<int32_t*>(shared + args.config.shared.keys) + j % kListRing * kTileKeys;
  }
  HA_DEVICE float* list_bias(int j) const {
    return reinterpret_cast<float*>(shared + args.config.shared.bias) + j % kListRing * walk.query_blocks * kTileKeys;
  }
  HA_DEVICE uint32_t buffer(int half_step) const { return shared_base + args.config.shared.ring + half_step % kBuffers * kTileBytes; }

  HA_DEVICE void load_queries(const Geometry& g, const char* q) const {
    const int chunk = thread_index() % kChunks;
    for (int row = thread_index() / kChunks; row < kTileRows; row += kAttendThreads / kChunks) {
      const int64_t index = int64_t(first_position) + row - g.first();
      const bool valid = index >= 0 && index < g.seq_q;
      copy_async(shared_base + tile_offset<D>(row, chunk), q + ((valid ? index : 0) * D + chunk * 8) * 2, valid);
    }
  }

  // The list of step j, if it has one. A barrier must lie between this and the list's readers.
  HA_DEVICE void prepare(int j) const {
    if (j >= walk.total) return;
    const Step step = walk.describe(j);
    if (!step.listed()) return;
    constexpr int kStride = kAttendThreads / kTileKeys;
    walk.write_entry(step, thread_index() % kTileKeys, thread_index() / kTileKeys, kStride, list_keys(j), list_bias(j));
  }

  // Starts the copy of half step h: keys (even) or values (odd) of step h / 2. Keys past the length are zeros (rule 2).
  HA_DEVICE void load(int h) const {
    const int j = h / 2;
    if (j < walk.total) {
      const Step step = walk.describe(j);
      const char* const source = h % 2 ? v : k;
      const uint32_t target = buffer(h);
      const int chunk = thread_index() % kChunks;
      const bool listed = step.listed(), pair = step.part == Part::kPair;
      const int32_t* const keys = list_keys(j);
#pragma unroll
      for (int i = 0; i < kTileKeys * kChunks / kAttendThreads; ++i) {
        const int row = thread_index() / kChunks + i * (kAttendThreads / kChunks);
        int key = step.start + row;
        if (listed) key = keys[row];
        if (pair) {
          const int start = row < kTileKeys / 2 ? step.start : step.upper;
          key = start < 0 ? -1 : start + row % (kTileKeys / 2);
        }
        const bool valid = key >= 0 && key < walk.length;
        copy_async(target + tile_offset<D>(row, chunk), source + (int64_t(valid ? key : 0) * D + chunk * 8) * 2, valid);
      }
    }
    copy_commit();
  }

  // Turns logits of a step of consecutive keys into masked base-2 logits.
  template <int kKeys>
  HA_DEVICE void mask_range(WarpState<T, D>& state, Part part, int start, float factor, int warp_position, int lane) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Bounds b = walk.bounds(part, warp_position + m * 16 + half * 8 + lane / 4);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = start + n * 8 + lane % 4 * 2 + i;
            float& x = state.logits[m][n][2 * half + i];
            x = key >= b.low && key < b.high ? x * factor : -INFINITY;
          }
        }
      }
    }
  }

  HA_DEVICE void add_bias(WarpState<T, D>& state, const float* bias, float factor, int warp_position, int lane) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = warp_position + m * 16 + half * 8 + lane / 4;
        const int query_block = int(floor_div(position, walk.a.block_size)) - walk.first_query_block;
        const float* const row = bias + query_block * kTileKeys + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = state.logits[m][n][2 * half + i];
            const float added = row[n * 8 + i];
            x = added == -INFINITY ? -INFINITY : fmaf(x, factor, added);  // a masked logit may be NaN
          }
        }
      }
    }
  }

  // Whether any row of the warp sees a key of the step.
  HA_DEVICE bool active(const Step& step, int start, int keys, int warp_first, int warp_last) const {
    if (warp_first > warp_last) return false;
    if (step.part == Part::kSample) return true;
    if (step.part == Part::kList) {
      const int first = (walk.first_query_block + step.owner) * walk.a.block_size;
      return warp_last >= first && warp_first < first + walk.a.block_size;
    }
    return start >= 0 && start < walk.bounds(step.part, warp_last).high && start + keys > walk.bounds(step.part, warp_first).low;
  }

  // One step: scores and probabilities, then values, each behind its barrier.
  template <int kKeys>
  HA_DEVICE void step(WarpState<T, D>& state, const Step& step, int j, int warp, int lane, float factor) const {
    const int half = kKeys == kTileKeys ? 0 : warp / 2;
    const uint32_t offset = uint32_t(half * kKeys * D * 2);
    const int position = first_position + warp * kWarpRows;
    const int warp_first = max(position, walk.first_row), warp_last = min(position + kWarpRows - 1, walk.last_row);
    const int start = half ? step.upper : step.start;
    const bool busy = active(step, start, kKeys, warp_first, warp_last);

    if (kBuffers % 2) prepare(j + kBuffers / 2);
    copy_wait<kBuffers - 2>();
    sync_block();
    load(2 * j + kBuffers - 1);
    if (busy) {
      state.template multiply_keys<kKeys>(shared_base + warp * kWarpRows * D * 2, buffer(2 * j) + offset, lane);
      if (step.listed()) {
        add_bias(state, list_bias(j), factor, position, lane);
        state.template softmax<kKeys>(1.0f);
      } else {
        const Bounds first = walk.bounds(step.part, position), last = walk.bounds(step.part, position + kWarpRows - 1);
        if (start >= last.low && start + kKeys <= first.high) {
          state.template softmax<kKeys>(factor);
        } else {
          mask_range<kKeys>(state, step.part, start, factor, position, lane);
          state.template softmax<kKeys>(1.0f);
        }
      }
    }

    if (kBuffers % 2 == 0) prepare(j + kBuffers / 2);
    copy_wait<kBuffers - 2>();
    sync_block();
    load(2 * j + kBuffers);
    if (busy) state.template multiply_values<kKeys>(buffer(2 * j + 1) + offset, lane);
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
HA_KERNEL(kAttendThreads, D == 64 ? 3 : 2) attend_kernel(const HA_CONSTANT AttendArgs args) {
  using Tile = AttendTile<T, D>;
  const Geometry g(args.p);
  const int64_t tile_index = args.config.tiles - 1 - block_index() % args.config.tiles;  // causal: the longest first
  const int64_t slice = block_index() / args.config.tiles, batch = slice / g.heads_q, head = slice % g.heads_q;
  const int64_t kv_slice = batch * g.heads_kv + head / g.group();
  const int warp = thread_index() / 32, lane = thread_index() % 32;

  static_assert(sizeof(Walk) <= kWalkBytes);
  unsigned char* const shared = shared_memory();
  Walk& walk = *reinterpret_cast<Walk*>(shared + args.config.shared.walk);
  const int64_t kv_start = kv_slice * g.seq_k * D * 2;
  const Tile tile{args,
                  walk,
                  static_cast<const char*>(args.p.k) + kv_start,
                  static_cast<const char*>(args.p.v) + kv_start,
                  shared,
                  shared_address(shared),
                  int((args.config.first_tile + tile_index) * kTileRows)};
  tile.load_queries(g, static_cast<const char*>(args.p.q) + slice * g.seq_q * D * 2);
  if (thread_index() == 0) {
    walk.chosen = reinterpret_cast<int32_t*>(shared + args.config.shared.chosen);
    walk.counts = reinterpret_cast<int32_t*>(shared + args.config.shared.counts);
    walk.start(args, g, tile.first_position, batch, head);
  }
  sync_block();
  if (thread_index() < args.config.query_blocks) walk.read_plan(g, args.p.plan_blocks, slice, thread_index());
  sync_block();
  if (thread_index() == 0) walk.plan_steps(g);
  sync_block();

  for (int j = 0; j < (Tile::kBuffers + 1) / 2; ++j) tile.prepare(j);
  sync_block();
  for (int h = 0; h < Tile::kBuffers - 1; ++h) tile.load(h);

  WarpState<T, D> state;
  state.clear();
  const float scale = g.a.scale > 0.0f ? g.a.scale : 1.0f / sqrtf(float(D));
  for (int j = 0; j < walk.total; ++j) {
    const Step step = walk.describe(j);
    if (step.part == Part::kPair)
      tile.template step<kTileKeys / 2>(state, step, j, warp, lane, scale * kLog2E);
    else
      tile.template step<kTileKeys>(state, step, j, warp, lane, scale * kLog2E);
  }
  copy_wait<0>();
  sync_block();
  tile.store(state, g, slice, warp, lane);
}

template <class T, int D>
void launch_attend(const AttendArgs& args) {
  const Geometry g(args.p);
  launch<attend_kernel<T, D>>(g.batch * g.heads_q * args.config.tiles, kAttendThreads, size_t(args.config.shared.bytes), args.p.stream, args);
}

}  // namespace ha
