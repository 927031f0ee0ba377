// The selector's quantised pools (rules 18 and 20) and where they lie in the workspace.
#pragma once
#include <cmath>

#include "cpu.h"
#include "kernels.h"

namespace ha::cpu {

// Query pools of one size: values [batch * heads_q][pools][head_dim], factors [batch * heads_q][pools].
struct QueryPools {
  int64_t rows, pools;
  int8_t* values;
  float* factors;
};

// Key pools of one size, packed: [batch * heads_kv][groups] of PackedPools' layout, behind the last pool NaN factors.
struct KeyPools {
  int64_t rows, groups;
  int8_t* values;
  float* factors;
};

// One pool of positions [start, stop); `values` gets head_dim numbers. Gives the factor, NaN where the pool is skipped.
float make_query_pool(const HaParams& params, const Geometry& g, int64_t b, int64_t head, int64_t start, int64_t stop, int8_t* values);
float make_key_pool(const HaParams& params, const Geometry& g, int64_t b, int64_t head, int64_t start, int64_t stop, int8_t* values);

// Number of byte pairs along a head in the packed layout.
inline int packed_pairs(const Geometry& g) { return int(ceil_div(g.head_dim, 2)); }

void fill(const HaParams& params, const QueryPools& pools, Workers& workers);
void fill(const HaParams& params, const KeyPools& pools, Workers& workers);

}  // namespace ha::cpu
