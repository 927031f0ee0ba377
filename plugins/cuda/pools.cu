// Quantised pools of queries or keys (rules 18 and 20): one pass over the tensor writes the fine and the coarse level.
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kBatch = 4;    // most rows that are summed at once
constexpr int kStages = 3;   // such batches in the ring
constexpr int kPerLane = 8;  // elements of a row that one lane holds
template <class T>
constexpr int pool_blocks = sizeof(T) == 4 ? 2 : 4;  // of threads that a multiprocessor holds

// Neighbouring lanes that share a row, a power of two for the reductions. Those past the head size hold zeros, which they
// also write where the pools' stride is longer.
HA_INLINE int row_lanes(int64_t stride) { return stride <= 64 ? 8 : stride <= 128 ? 16 : 32; }

// Pools of the larger size, by their number from position 0: what `kLanes` neighbouring lanes make at a time.
HA_INLINE Range pool_units(const Geometry& g, bool queries, int64_t rows) {
  return queries ? g.query_pools(rows) : Range{0, g.key_pools(rows)};
}

// Units that the same lanes make, where each makes one in `blocks` blocks of threads: more where enough blocks are left.
HA_INLINE int64_t pool_run(int64_t blocks) { return max64(1, min64(blocks / 2048, 8)); }

// rint(x / a), at most 127 either way, as bytes. Quotients come from one product with the inverse wherever its error cannot change
// what they round to.
HA_DEVICE void quantise(const float (&x)[kPerLane], float a, uint32_t (&packed)[2]) {
  constexpr float kShift = 12582912.0f;    // 2^23 + 2^22: a sum with it rounds to an integer, whose byte is the sum's lowest
  constexpr float kSafe = 0.5f - 1e-4f;    // the product is within 2^-21 of the quotient, relatively, and that within 127.5
  const float inverse = reciprocal_fast(a);
  uint32_t bytes[kPerLane];
  float farthest = a > 1e-30f && a < 1e30f ? 0.0f : 1.0f;
  for (int i = 0; i < kPerLane; ++i) {
    const float sum = fma_rn(x[i], inverse, kShift);
    farthest = fmaxf(farthest, fabsf(fma_rn(x[i], inverse, -add_rn(sum, -kShift))));
    bytes[i] = float_bits(sum);
  }
  if (farthest > kSafe) {
    for (int i = 0; i < kPerLane; ++i) bytes[i] = uint32_t(int(fminf(fmaxf(rintf(div_rn(x[i], a)), -127.0f), 127.0f)));
  }
  for (int i = 0; i < 2; ++i)
    packed[i] = pick_bytes(pick_bytes(bytes[4 * i], bytes[4 * i + 1], 0x40), pick_bytes(bytes[4 * i + 2], bytes[4 * i + 3], 0x40), 0x5410);
}

// A pool's sum and what becomes of it. kLanes neighbouring lanes hold one row.
template <int kLanes>
struct Accumulator {
  float sum[kPerLane] = {};
  int eligible = 0, seen = 0;
  int pool;        // counted from that of the first row
  int8_t* values;  // where this lane's part of it goes
  float* scale;

  // Starts with pool `start` of slice `slice` (batch and head).
  HA_DEVICE Accumulator(const Pools& out, int64_t slice, int start, int lane)
      : pool(start),
        values(out.values + (slice * out.count + pool) * out.stride + lane * kPerLane),
        scale(out.scales + slice * out.count + pool) {}

  HA_DEVICE void add(const float (&x)[kPerLane]) {
    for (int i = 0; i < kPerLane; ++i) sum[i] = add_rn(sum[i], x[i]);
  }

  // `rows` positions are done, `taken` of them eligible, among which no pool ended. At a pool's end quantises the mean, writes it
  // and starts the next pool.
  HA_DEVICE void pass(int rows, int taken, const Pools& out, int side, int lane) {
    eligible += taken;
    if ((seen += rows) < out.rows) return;
    flush(out, side, lane);
    for (int i = 0; i < kPerLane; ++i) sum[i] = 0.0f;
    eligible = seen = 0;
    ++pool, ++scale, values += out.stride;
  }

  HA_DEVICE void flush(const Pools& out, int side, int lane) {
    const float count = float(eligible ? eligible : 1);
    float mean[kPerLane];
    if (eligible & (eligible - 1)) {
      for (int i = 0; i < kPerLane; ++i) mean[i] = div_rn(sum[i], count);
    } else {  // a power of two: the product with its inverse is the same
      const float inverse = bits_float(uint32_t(127 - count_bits(uint32_t(eligible ? eligible - 1 : 0))) << 23);
      for (int i = 0; i < kPerLane; ++i) mean[i] = mul_rn(sum[i], inverse);
    }
    uint32_t bits = 0;  // of the largest size; sizes are ordered as their bits are, infinite and NaN last
    for (int i = 0; i < kPerLane; ++i) bits = max(bits, float_bits(mean[i]) & 0x7fffffffu);
    for (int mask = 1; mask < kLanes; mask *= 2) bits = max(bits, uint32_t(shuffle_xor(int(bits), mask)));
    const bool used = eligible > 0 && bits < 0x7f800000u;
    float a = div_rn(used ? bits_float(bits) : 0.0f, 127.0f);
    if (a == 0.0f) a = 1.0f;
    uint32_t packed[2] = {};
    if (used) quantise(mean, a, packed);
    float written = a;
    if (side == HA_QUERIES) {
      int square = dot4(packed[0], packed[0], dot4(packed[1], packed[1], 0));
      for (int mask = 1; mask < kLanes; mask *= 2) square += shuffle_xor(square, mask);
      written = div_rn(1.0f, sqrt_rn(float(square > 1 ? square : 1)));
    }
    if (pool >= 0 && pool < out.count) {
      if (lane * kPerLane < out.stride) {
        uint32_t* const target = reinterpret_cast<uint32_t*>(values);
        target[0] = packed[0];
        target[1] = packed[1];
      }
      if (lane == 0) *scale = used ? written : NAN;
    }
  }
};

// The rows at the next positions of a run.
struct Cursor {
  int row, stop;  // that of the next position, before row 0 where there is none; those from `stop` on are not eligible
  int jump;       // row at which the run goes on with row `then`, all up to `live`
  int then, live;

  HA_DEVICE void advance(int rows) {
    row += rows;
    if (row == jump) row = then, stop = live, jump = INT32_MAX;
  }
};

// How the work is cut. A unit is a pool of the larger size; kLanes neighbouring lanes make the pools of `run` units one after the other.
struct PoolLaunch {
  PoolArgs pools;
  int unit, together;        // rows of a unit, and those that are summed at once, among which no pool ends
  int run, groups;           // groups: blocks of threads of a slice
  int64_t first;             // unit of all, counted from position 0
  int fine, coarse;          // its first pools, counted from those of the first row
  int per_fine, per_coarse;  // pools of a unit
};

// Rows come through a ring in shared memory, each lane's part by itself, so that some are always on their way.
template <class T, int kLanes>
HA_KERNEL(kPoolThreads, pool_blocks<T>) pool_kernel(const HA_CONSTANT PoolLaunch cut) {
  constexpr int kRuns = kPoolThreads / kLanes, kParts = kPerLane / kPieceElements<T>;
  const PoolArgs& args = cut.pools;
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int unit = cut.unit, together = cut.together;
  const int64_t rows = queries ? g.seq_q : g.seq_k;
  const int64_t first = queries ? g.first() : 0;  // position of row 0
  const uint32_t index = uint32_t(block_index()), slice = index / uint32_t(cut.groups);
  const int64_t batch = slice / uint32_t(queries ? g.heads_q : g.heads_kv);
  const int lane = thread_index() % kLanes;
  const int own = (int(index % uint32_t(cut.groups)) * kRuns + thread_index() / kLanes) * cut.run;  // first unit
  const int64_t start = (cut.first + own) * unit;  // position

  const int64_t length = g.length(args.p.lengths, batch);
  const int from = queries ? 0 : int(min64(g.a.sinks, length)), live = int(queries ? g.live_rows(length) : length);
  Cursor loading{int(min64(start - first, rows)), live, INT32_MAX, 0, live};
  // All that the first unit of queries has is row 0, as its last (rule 22).
  if (queries && g.a.strict_causal && own == 0) loading = {1 - unit, min(live, 1), 1, int(start + unit - first), live};
  Cursor taking = loading;

  const int step = int(g.head_dim) * int(sizeof(T));
  const char* const tensor = static_cast<const char*>(queries ? args.p.q : args.p.k);
  const char* const source = tensor + slice * rows * step + lane * kPerLane * sizeof(T);
  const bool holds = lane * kPerLane < g.head_dim;
  unsigned char* const ring = shared_memory() + thread_index() * 16;
  const auto slot = [&](int stage, int i, int part) { return ring + ((stage * kBatch + i) * kParts + part) * kPoolThreads * 16; };
  const auto load = [&](int stage) {
    const char* const row = source + int64_t(loading.row) * step;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool inside = holds && i < together && loading.row + i >= from && loading.row + i < loading.stop;
#pragma unroll
      for (int part = 0; part < kParts; ++part) copy_async(shared_address(slot(stage, i, part)), row + i * step + part * 16, inside);
    }
    copy_commit();
    loading.advance(together);
  };

  const int batches = unit / together * cut.run;
  int stage = 0;
  for (; stage < kStages - 1; ++stage) load(stage);  // past the end of a run for nothing, where it is short
  Accumulator<kLanes> fine(args.fine, slice, cut.fine + own * cut.per_fine, lane);
  Accumulator<kLanes> coarse(args.coarse, slice, cut.coarse + own * cut.per_coarse, lane);
  for (int i = 0; i < batches; ++i) {
    load(stage);
    copy_wait<kStages - 1>();
    stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      float x[kPerLane];  // zeros of a row that is not taken change no sum, which starts from 0 and is never -0
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        unpack<T>(*reinterpret_cast<const Words4*>(slot(stage, row, part)), x + part * kPieceElements<T>);
      fine.add(x);
      coarse.add(x);
    }
    const int taken = max(min(taking.row + together, taking.stop) - max(taking.row, from), 0);
    taking.advance(together);
    fine.pass(together, taken, args.fine, args.side, lane);
    if (args.coarse.rows) coarse.pass(together, taken, args.coarse, args.side, lane);
  }
  copy_wait<0>();
}

template <class T, int kLanes>
void launch_instance(const PoolArgs& args) {
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int64_t rows = queries ? g.seq_q : g.seq_k, slices = g.batch * (queries ? g.heads_q : g.heads_kv);
  if (rows == 0) return;
  const Pools &fine = args.fine, &coarse = args.coarse;
  PoolLaunch cut{args, int(max64(fine.rows, coarse.rows)), kBatch, 0, 0, 0, 0, 0, 0, 0};
  while (fine.rows % cut.together || coarse.rows % cut.together) --cut.together;
  const Range units = pool_units(g, queries, cut.unit);
  cut.first = units.start;
  const auto first_pool = [&](const Pools& pools) {
    return int(units.start * cut.unit / pools.rows - (queries ? g.query_pools(pools.rows).start : 0));
  };
  cut.fine = first_pool(fine), cut.per_fine = cut.unit / fine.rows;
  if (coarse.rows) cut.coarse = first_pool(coarse), cut.per_coarse = cut.unit / coarse.rows;
  cut.run = int(pool_run(slices * ceil_div(units.size(), kPoolThreads / kLanes)));
  cut.groups = int(ceil_div(units.size(), kPoolThreads / kLanes * cut.run));
  const size_t ring = size_t(kStages * kBatch * kPerLane * kPoolThreads) * sizeof(T);
  launch<pool_kernel<T, kLanes>>(slices * cut.groups, kPoolThreads, ring, args.p.stream, cut);
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
