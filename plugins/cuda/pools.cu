// Quantised pools of queries or keys (rules 18 and 20): one pass over the tensor writes the fine and the coarse level.
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kBatch = 4;    // rows in flight at once
constexpr int kPerLane = 8;  // elements of a row that one lane holds

// Neighbouring lanes that share a row, a power of two for the reductions. Those past the head size hold zeros, which they
// also write where the pools' stride is longer.
HA_INLINE int row_lanes(int64_t stride) { return stride <= 64 ? 8 : stride <= 128 ? 16 : 32; }

// A pool's sum and what becomes of it. kLanes neighbouring lanes hold one row.
template <int kLanes>
struct Accumulator {
  float sum[kPerLane] = {};
  int eligible = 0, seen = 0;

  HA_DEVICE void add(const float (&x)[kPerLane]) {
    for (int i = 0; i < kPerLane; ++i) sum[i] = add_rn(sum[i], x[i]);
    ++eligible;
  }

  // Quantises the mean, writes it as pool `pool` of `out` (`slice` = batch and head) and starts the next pool.
  HA_DEVICE void flush(const Pools& out, int64_t slice, int64_t pool, int side, int lane) {
    const float count = float(eligible);
    float mean[kPerLane], largest = 0.0f;
    for (int i = 0; i < kPerLane; ++i) {
      mean[i] = div_rn(sum[i], eligible ? count : 1.0f);
      const float size = fabsf(mean[i]);
      largest = fmaxf(largest, size <= 3.402823466e38f ? size : INFINITY);  // NaN becomes infinite, which fmaxf keeps
    }
    for (int mask = 1; mask < kLanes; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    const bool used = eligible > 0 && largest < INFINITY;
    float a = div_rn(largest, 127.0f);
    if (a == 0.0f) a = 1.0f;
    uint32_t packed[2] = {};
    int square = 0;
    for (int i = 0; i < kPerLane; ++i) {
      const int value = used ? int(fminf(fmaxf(rintf(div_rn(mean[i], a)), -127.0f), 127.0f)) : 0;
      packed[i / 4] |= uint32_t(value & 0xff) << (i % 4 * 8);
      square += value * value;
    }
    for (int mask = 1; mask < kLanes; mask *= 2) square += shuffle_xor(square, mask);
    if (pool >= 0 && pool < out.count) {
      const int64_t at = slice * out.count + pool;
      if (lane * kPerLane < out.stride) {
        uint32_t* target = reinterpret_cast<uint32_t*>(out.values + at * out.stride + lane * kPerLane);
        target[0] = packed[0];
        target[1] = packed[1];
      }
      const float scale = side == HA_QUERIES ? div_rn(1.0f, sqrt_rn(float(square > 1 ? square : 1))) : a;
      if (lane == 0) out.scales[at] = used ? scale : NAN;
    }
    *this = Accumulator();
  }
};

template <class T, int kLanes>
HA_KERNEL(kPoolThreads, sizeof(T) == 4 ? 2 : 3) pool_kernel(const HA_CONSTANT PoolArgs args) {
  constexpr int kUnits = kPoolThreads / kLanes, kParts = kPerLane / kPieceElements<T>;
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int unit = args.fine.rows > args.coarse.rows ? args.fine.rows : args.coarse.rows;
  const int64_t heads = queries ? g.heads_q : g.heads_kv, rows = queries ? g.seq_q : g.seq_k;
  const int64_t first = queries ? g.first() : 0;  // position of row 0
  const int64_t unit0 = floor_div(first, unit), units = floor_div(first + rows - 1, unit) - unit0 + 1;
  const int64_t groups = ceil_div(units, kUnits);
  const int64_t slice = block_index() / groups, batch = slice / heads;
  const int lane = thread_index() % kLanes;
  const int64_t start = (unit0 + block_index() % groups * kUnits + thread_index() / kLanes) * unit;  // position

  const int64_t length = g.length(args.p.lengths, batch);
  const Range eligible = queries ? Range{0, g.live_rows(length)} : Range{min64(g.a.sinks, length), length};
  const int64_t row_bytes = g.head_dim * int64_t{sizeof(T)};
  const char* source = static_cast<const char*>(queries ? args.p.q : args.p.k) + slice * rows * row_bytes + lane * kPerLane * sizeof(T);
  const bool holds = lane * kPerLane < g.head_dim;

  Accumulator<kLanes> fine, coarse;
  for (int base = 0; base < unit; base += kBatch) {
    Words4 raw[kBatch][kParts] = {};
    bool take[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = start + base + i - first;
      take[i] = base + i < unit && row >= eligible.start && row < eligible.stop;
      if (take[i] && holds) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) raw[i][part] = load16(source + row * row_bytes + part * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + i >= unit) break;
      float x[kPerLane];
      if (take[i]) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) unpack<T>(raw[i][part], x + part * kPieceElements<T>);
        fine.add(x);
        if (args.coarse.rows) coarse.add(x);
      }
      const int64_t position = start + base + i;
      if (++fine.seen == args.fine.rows) {
        fine.flush(args.fine, slice, floor_div(position, args.fine.rows) - floor_div(first, args.fine.rows), args.side, lane);
      }
      if (args.coarse.rows && ++coarse.seen == args.coarse.rows) {
        coarse.flush(args.coarse, slice, floor_div(position, args.coarse.rows) - floor_div(first, args.coarse.rows), args.side, lane);
      }
    }
  }
}

template <class T, int kLanes>
void launch_instance(const PoolArgs& args) {
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int64_t rows = queries ? g.seq_q : g.seq_k, first = queries ? g.first() : 0, heads = queries ? g.heads_q : g.heads_kv;
  if (rows == 0) return;
  const int unit = args.fine.rows > args.coarse.rows ? args.fine.rows : args.coarse.rows;
  const int64_t units = floor_div(first + rows - 1, unit) - floor_div(first, unit) + 1;
  const int64_t groups = ceil_div(units, kPoolThreads / kLanes);
  launch<pool_kernel<T, kLanes>>(g.batch * heads * groups, kPoolThreads, 0, args.p.stream, args);
}

template <class T>
void launch_type(const PoolArgs& args) {
  const int lanes = row_lanes(args.fine.stride);
  return lanes == 8 ? launch_instance<T, 8>(args) : lanes == 16 ? launch_instance<T, 16>(args) : launch_instance<T, 32>(args);
}

}  // namespace

void launch_pools(const PoolArgs& args) {
  with_elements(args.p.dtype, [&](auto element) { launch_type<decltype(element)>(args); });
}

}  // namespace ha
