// Quantised pools of queries or keys (rules 18 and 20): one pass over the tensor writes the fine and the coarse level.
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kBatch = 4;    // most rows in flight at once
constexpr int kPerLane = 8;  // elements of a row that one lane holds

// Neighbouring lanes that share a row, a power of two for the reductions. Those past the head size hold zeros, which they
// also write where the pools' stride is longer.
HA_INLINE int row_lanes(int64_t stride) { return stride <= 64 ? 8 : stride <= 128 ? 16 : 32; }

// Pools of the larger size, by their number from position 0: what `kLanes` neighbouring lanes make at a time.
HA_INLINE Range pool_units(const Geometry& g, bool queries, int64_t rows) {
  return queries ? g.query_pools(rows) : Range{0, g.key_pools(rows)};
}

// rint(x / a), at most 127 either way, as bytes. Quotients come from one product with the inverse wherever its error cannot change
// what they round to.
HA_DEVICE void quantise(const float (&x)[kPerLane], float a, uint32_t (&packed)[2]) {
  constexpr float kShift = 12582912.0f;    // 2^23 + 2^22: a sum with it rounds to an integer, whose byte is the sum's lowest
  constexpr float kSafe = 0.5f - 1e-4f;    // the product is within 2^-21 of the quotient, relatively, and that within 127.5
  const float inverse = reciprocal_fast(a);
  uint32_t bytes[kPerLane];
  float farthest = a > 1e-30f && a < 1e30f ? 0.0f : 1.0f;
  for (int i = 0; i < kPerLane; ++i) {
    const float quotient = mul_rn(x[i], inverse), sum = add_rn(quotient, kShift);
    farthest = fmaxf(farthest, fabsf(add_rn(quotient, -add_rn(sum, -kShift))));
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
  int64_t pool = 0;

  // Starts at position `start`; `g` says where the pools of a query begin, those of a key begin at 0.
  HA_DEVICE Accumulator(const Pools& out, const Geometry& g, bool queries, int64_t start) {
    if (out.rows) pool = floor_div(start, out.rows) - (queries ? g.query_pools(out.rows).start : 0);
  }

  HA_DEVICE void add(const float (&x)[kPerLane], int rows) {
    for (int i = 0; i < kPerLane; ++i) sum[i] = add_rn(sum[i], x[i]);
    eligible += rows;
  }

  // `rows` positions are done, among which no pool ended. At a pool's end quantises the mean, writes it to `out` (`slice` = batch
  // and head) and starts the next pool.
  HA_DEVICE void pass(int rows, const Pools& out, int64_t slice, int side, int lane) {
    if ((seen += rows) < out.rows) return;
    flush(out, slice, side, lane);
    for (int i = 0; i < kPerLane; ++i) sum[i] = 0.0f;
    eligible = seen = 0;
    ++pool;
  }

  HA_DEVICE void flush(const Pools& out, int64_t slice, int side, int lane) {
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
    int square = dot4(packed[0], packed[0], dot4(packed[1], packed[1], 0));
    for (int mask = 1; mask < kLanes; mask *= 2) square += shuffle_xor(square, mask);
    if (pool >= 0 && pool < out.count) {
      const int64_t at = slice * out.count + pool;
      if (lane * kPerLane < out.stride) {
        uint32_t* target = reinterpret_cast<uint32_t*>(out.values + at * out.stride + lane * kPerLane);
        target[0] = packed[0];
        target[1] = packed[1];
      }
      if (lane == 0) {
        if (side == HA_QUERIES) a = div_rn(1.0f, sqrt_rn(float(square > 1 ? square : 1)));
        out.scales[at] = used ? a : NAN;
      }
    }
  }
};

template <class T, int kLanes>
HA_KERNEL(kPoolThreads, sizeof(T) == 4 ? 2 : 4) pool_kernel(const HA_CONSTANT PoolArgs args) {
  constexpr int kUnits = kPoolThreads / kLanes, kParts = kPerLane / kPieceElements<T>;
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int unit = args.fine.rows > args.coarse.rows ? args.fine.rows : args.coarse.rows;
  const int64_t heads = queries ? g.heads_q : g.heads_kv, rows = queries ? g.seq_q : g.seq_k;
  const int64_t first = queries ? g.first() : 0;  // position of row 0
  const Range units = pool_units(g, queries, unit);
  const int64_t groups = ceil_div(units.size(), kUnits);
  const int64_t slice = block_index() / groups, batch = slice / heads;
  const int lane = thread_index() % kLanes;
  const int64_t own = units.start + block_index() % groups * kUnits + thread_index() / kLanes, start = own * unit;  // position
  const bool first_row = queries && g.a.strict_causal && own == units.start;  // all that this unit has, as its last row (rule 22)

  const int64_t length = g.length(args.p.lengths, batch);
  const int64_t live = first_row ? min64(g.live_rows(length), 1) : g.live_rows(length);
  const Range eligible = queries ? Range{0, live} : Range{min64(g.a.sinks, length), length};
  const int64_t row_bytes = g.head_dim * int64_t{sizeof(T)};
  const char* source = static_cast<const char*>(queries ? args.p.q : args.p.k) + slice * rows * row_bytes + lane * kPerLane * sizeof(T);
  const bool holds = lane * kPerLane < g.head_dim;
  // Rows of this unit that are eligible, counted from its first position, behind which row 0 lies `before` positions.
  const int64_t before = first_row ? unit - 1 : first - start;
  const auto local = [&](int64_t row) { return int(max64(0, min64(row + before, unit))); };
  const int from = local(eligible.start), to = local(eligible.stop);
  source -= before * row_bytes;

  Accumulator<kLanes> fine(args.fine, g, queries, start), coarse(args.coarse, g, queries, start);
  for (int base = 0; base < unit; base += args.together) {
    Words4 raw[kBatch][kParts] = {};
    bool take[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = base + i;
      take[i] = i < args.together && row >= from && row < to;
      if (take[i] && holds) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) raw[i][part] = load16(source + int64_t(row) * row_bytes + part * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float x[kPerLane];  // zeros of a row that is not taken change no sum, which starts from 0 and is never -0
#pragma unroll
      for (int part = 0; part < kParts; ++part) unpack<T>(raw[i][part], x + part * kPieceElements<T>);
      fine.add(x, take[i]);
      if (args.coarse.rows) coarse.add(x, take[i]);
    }
    fine.pass(args.together, args.fine, slice, args.side, lane);
    if (args.coarse.rows) coarse.pass(args.together, args.coarse, slice, args.side, lane);
  }
}

template <class T, int kLanes>
void launch_instance(PoolArgs args) {
  const Geometry g(args.p);
  args.together = kBatch;
  while (args.fine.rows % args.together || args.coarse.rows % args.together) --args.together;
  const bool queries = args.side == HA_QUERIES;
  const int64_t rows = queries ? g.seq_q : g.seq_k, heads = queries ? g.heads_q : g.heads_kv;
  if (rows == 0) return;
  const int unit = args.fine.rows > args.coarse.rows ? args.fine.rows : args.coarse.rows;
  const int64_t groups = ceil_div(pool_units(g, queries, unit).size(), kPoolThreads / kLanes);
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
