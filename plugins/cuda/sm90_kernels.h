// The one table of Hopper kernel instances that dispatch and instantiation share.
#pragma once
#include "kernels.h"
#include "sm90_config.h"

namespace ha {

// X(element type, HaDtype, padded head size): one sm90_attend_*.cu file each.
#define HA_HOPPER_INSTANCES(X)                                                     \
  X(Half, HA_FLOAT16, 64) X(Half, HA_FLOAT16, 128) X(Bfloat16, HA_BFLOAT16, 64) X(Bfloat16, HA_BFLOAT16, 128)

// As launch_attend, for problems that uses_hopper takes.
template <class T, int P>
void launch_hopper(const AttendArgs& args);

}  // namespace ha
