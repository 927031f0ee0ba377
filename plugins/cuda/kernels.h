// What each kernel is launched with, and the one table of kernel instances that dispatch and instantiation share.
#pragma once
#include "launch_config.h"

namespace ha {

struct Half;
struct Bfloat16;

// X(element type, HaDtype, head size): one attend_*.cu file each.
#define HA_ATTEND_INSTANCES(X) \
  X(Half, HA_FLOAT16, 64)      \
  X(Half, HA_FLOAT16, 128)     \
  X(Bfloat16, HA_BFLOAT16, 64) \
  X(Bfloat16, HA_BFLOAT16, 128)

// Quantised pools of one tensor: values int8 [batch, heads, count, head_dim], scales float [batch, heads, count].
struct Pools {
  int8_t* values;
  float* scales;
  int32_t rows;  // positions a pool; 0 = not wanted
  int64_t count;
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
  int32_t* blocks;
};

struct SampleArgs {
  HaParams p;
  int32_t* index;
  float* weight;
};

struct AttendArgs {
  HaParams p;
  AttendConfig config;
};

// Each throws Error(HA_FAILED) when the launch is refused and Error(HA_UNSUPPORTED) when the grid cannot hold the problem.
void launch_pools(const PoolArgs& args);
void launch_select(const SelectArgs& args);
void launch_samples(const SampleArgs& args);
template <class T, int D>
void launch_attend(const AttendArgs& args);

}  // namespace ha
