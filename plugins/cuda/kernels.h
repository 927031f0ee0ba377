// What each kernel is launched with, and the one table of kernel instances that dispatch and instantiation share.
#pragma once
#include "attend_config.h"
#include "launch_config.h"

namespace ha {

struct Half;
struct Bfloat16;

// X(element type, HaDtype, padded head size): one attend_*.cu file each.
#define HA_ATTEND_SIZES(X, T, DTYPE) X(T, DTYPE, 32) X(T, DTYPE, 64) X(T, DTYPE, 96) X(T, DTYPE, 128) X(T, DTYPE, 192) X(T, DTYPE, 256)
#define HA_ATTEND_INSTANCES(X)         \
  HA_ATTEND_SIZES(X, Half, HA_FLOAT16) \
  HA_ATTEND_SIZES(X, Bfloat16, HA_BFLOAT16) \
  HA_ATTEND_SIZES(X, float, HA_FLOAT32)

// Quantised pools of one tensor: values int8 [batch, heads, count, stride], scales float [batch, heads, count].
struct Pools {
  int8_t* values;
  float* scales;
  int32_t rows;  // positions a pool; 0 = not wanted
  int64_t count;
  int64_t stride;  // at least the head size, behind which lie zeros
};

struct PoolArgs {
  HaParams p;
  int32_t side;
  Pools fine, coarse;  // one pass writes both; the smaller number of rows divides the larger
};

struct SelectArgs {
  HaParams p;
  SelectConfig config;
  Pools q_fine, q_coarse, k_fine, k_coarse;
  int32_t* plan;
};

struct HashArgs {
  HaParams p;
  uint16_t *ranks_q, *ranks_k;  // [batch, heads, rows] of each side, as sort.cuh has them
  uint32_t* counts;             // chunk_counts(g) words; null where no level is sorted by chunks
  float* least;                 // with hash_centre: least_sums(g) floats, which launch_centre writes; else null
};

struct SortArgs {
  HaParams p;
  const uint16_t *ranks_q, *ranks_k;
  int32_t* plan;
  int32_t* scratch;  // as large as the plan, for ranks of two digits; else null
  uint32_t* counts;  // of HashArgs
};

struct SampleArgs {
  HaParams p;
  int32_t* index;
  float* weight;
};

// `p.plan` is required off the exact path. `lse` [batch, heads_q, seq_q] is p.lse, or scratch of the same shape where the caller
// wants none: where attention takes several launches, it and p.out carry what a row has seen from one to the next; else it may be null.
struct AttendArgs {
  HaParams p;
  float* lse;
};

// Each throws Error(HA_FAILED) when the launch is refused and Error(HA_UNSUPPORTED) when the grid cannot hold the problem.
void launch_pools(const PoolArgs& args);
void launch_select(const SelectArgs& args);
// What each sum of a hash has to be above: of every batch row and head of the queries, then of the keys, kMaxProjections floats.
void launch_centre(const HashArgs& args);
void launch_hash(const HashArgs& args);
// The levels of the tree that are sorted by chunks, and the others: see sort_config.h.
void launch_sort_chunks(const SortArgs& args);
void launch_sort_nodes(const SortArgs& args);
void launch_samples(const SampleArgs& args);
// All of stage 4, for either selector and the exact path: `sortlsh` takes one launch a level of its tree and one for the local part
// and the sinks; on Hopper `blocks` may take one for what its plan names and one for these, too (splits_blocks).
template <class T, int P>
void launch_attend(const AttendArgs& args);

}  // namespace ha
