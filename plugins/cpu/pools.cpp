#include "pools.h"

#include <cstring>

namespace ha::cpu {
namespace {
constexpr int64_t kPoolsAUnit = 64;

float skipped(const Geometry& g, int8_t* values) {
  std::memset(values, 0, size_t(g.head_dim));
  return NAN;
}
}  // namespace

float make_query_pool(const HaParams& params, const Geometry& g, int64_t b, int64_t head, int64_t start, int64_t stop, int8_t* values) {
  const int64_t first = max64(start - g.first(), 0), last = min64(stop - g.first(), g.live_rows(g.length(params.lengths, b)));
  if (first >= last) return skipped(g, values);
  const float* q = static_cast<const float*>(params.q) + ((b * g.heads_q + head) * g.seq_q + first) * g.head_dim;
  if (std::isnan(kernels().pool(q, last - first, int(g.head_dim), values))) return NAN;
  int32_t square = 0;
  for (int64_t d = 0; d < g.head_dim; ++d) square += int32_t{values[d]} * values[d];
  return 1.0f / std::sqrt(float(square > 1 ? square : 1));
}

float make_key_pool(const HaParams& params, const Geometry& g, int64_t b, int64_t head, int64_t start, int64_t stop, int8_t* values) {
  const int64_t first = max64(start, g.a.sinks), last = min64(stop, g.length(params.lengths, b));
  if (first >= last) return skipped(g, values);
  const float* k = static_cast<const float*>(params.k) + ((b * g.heads_kv + head) * g.seq_k + first) * g.head_dim;
  return kernels().pool(k, last - first, int(g.head_dim), values);
}

void fill(const HaParams& params, const QueryPools& pools, Workers& workers) {
  const Geometry g(params);
  const int64_t chunks = ceil_div(pools.pools, kPoolsAUnit), base = g.query_pools(pools.rows).start;
  for_each_unit(workers, g.batch * g.heads_q * chunks, [&] {
    return [&](int64_t unit) {
      const int64_t head = unit / chunks, begin = unit % chunks * kPoolsAUnit, end = min64(begin + kPoolsAUnit, pools.pools);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = head * pools.pools + i, start = (base + i) * pools.rows;
        const Range own = g.a.strict_causal && i == 0 ? Range{g.first(), g.first() + 1} : Range{start, start + pools.rows};  // rule 22
        pools.factors[at] = make_query_pool(params, g, head / g.heads_q, head % g.heads_q, own.start, own.stop,
                                            pools.values + at * g.head_dim);
      }
    };
  });
}

void fill(const HaParams& params, const KeyPools& pools, Workers& workers) {
  const Geometry g(params);
  const int pairs = packed_pairs(g);
  for_each_unit(workers, g.batch * g.heads_kv * pools.groups, [&] {
    return [&](int64_t unit) {
      const int64_t head = unit / pools.groups, group = unit % pools.groups;
      int8_t* packed = pools.values + unit * pairs * kPoolGroup * 2;
      int8_t values[kMaxHeadDim + 1] = {};  // an odd head ends in half a pair
      for (int lane = 0; lane < kPoolGroup; ++lane) {
        const int64_t start = (group * kPoolGroup + lane) * pools.rows;
        pools.factors[unit * kPoolGroup + lane] =
            make_key_pool(params, g, head / g.heads_kv, head % g.heads_kv, start, start + pools.rows, values);
        for (int pair = 0; pair < pairs; ++pair) std::memcpy(packed + (pair * kPoolGroup + lane) * 2, values + pair * 2, 2);
      }
    };
  });
}

void pool(const HaParams& params, HaSide side, int64_t rows, int8_t* values, float* factors, Workers& workers) {
  const Geometry g(params);
  if (side == HA_QUERIES) return fill(params, QueryPools{rows, g.query_pools(rows).size(), values, factors}, workers);
  const int64_t pools = g.key_pools(rows);
  for_each_unit(workers, g.batch * g.heads_kv * pools, [&] {
    return [&](int64_t unit) {
      const int64_t head = unit / pools, start = unit % pools * rows;
      factors[unit] = make_key_pool(params, g, head / g.heads_kv, head % g.heads_kv, start, start + rows, values + unit * g.head_dim);
    };
  });
}

}  // namespace ha::cpu
