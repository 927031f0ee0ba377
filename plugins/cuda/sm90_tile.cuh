// Where everything of one block of threads of the Hopper kernels lies in shared memory: queries, a ring of buffers that keys and values
// pass through, what is known of two tiles and of the next steps, and the barriers between the warp groups.
#pragma once
#include "sm90_config.h"
#include "sm90_device.cuh"
#include "walk.cuh"

namespace ha {

constexpr float kHopperLog2E = 1.4426950408889634f, kHopperLn2 = 0.6931471805599453f;

// The constants that the walks take: a warp group is their `warp`.
struct HopperShape {
  static constexpr int kWarps = kHopperGroups, kWarpRows = 64, kTileRows = kHopperRows, kKeys = kHopperKeys;
  static constexpr bool kPairs = true, kOwnedPairs = true;
  static constexpr int kPairBlock = kTileKeys;
};

struct HopperArgs {
  HaParams p;
  float* lse;
  HopperConfig config;
  TileMap queries, keys, values;
};

template <class T, int P, class Walk>
struct HopperBlock {
  static constexpr int kBuffers = hopper_buffers(P), kSteps = hopper_steps(P);
  static_assert(sizeof(Walk) <= kWalkBytes);

  const HopperArgs& args;
  unsigned char* shared;
  uint32_t base;
  int step_index = 0;  // of the ring of steps: the next one

  template <class X>
  HA_DEVICE X* at(int offset) const {
    return reinterpret_cast<X*>(shared + offset);
  }
  HA_DEVICE const HopperShared& offsets() const { return args.config.shared; }
  HA_DEVICE Walk& walk(int parity) const { return *at<Walk>(offsets().walk + parity * kWalkBytes); }
  HA_DEVICE Row& row(int parity, int row) const { return at<Row>(offsets().rows)[parity * kHopperRows + row]; }
  HA_DEVICE int32_t* chosen(int parity) const {
    return at<int32_t>(offsets().chosen + parity * ((offsets().counts - offsets().chosen) / 2));
  }
  HA_DEVICE int32_t* counts(int parity) const { return at<int32_t>(offsets().counts) + parity * args.config.attend.query_blocks; }

  HA_DEVICE Step* step() const { return at<Step>(offsets().steps) + step_index; }
  HA_DEVICE int32_t* list_keys() const { return at<int32_t>(offsets().keys) + step_index * kHopperKeys; }
  HA_DEVICE float* list_bias() const {
    return at<float>(offsets().bias) + step_index * args.config.attend.query_blocks * kHopperKeys;
  }
  HA_DEVICE void next_step() { step_index = step_index + 1 == kSteps ? 0 : step_index + 1; }

  HA_DEVICE uint32_t queries() const { return base; }
  HA_DEVICE uint32_t buffer(int index) const { return base + offsets().ring + index * (kHopperKeys * P * 2); }
  HA_DEVICE uint32_t full(int index) const { return base + offsets().barriers + index * 8; }
  HA_DEVICE uint32_t free(int index) const { return full(kBuffers + index); }
  HA_DEVICE uint32_t queries_ready() const { return full(2 * kBuffers); }
  HA_DEVICE uint32_t queries_free() const { return full(2 * kBuffers + 1); }
  HA_DEVICE uint32_t tile_done(int parity) const { return full(2 * kBuffers + 2 + parity); }

  HA_DEVICE void init_barriers() const {
    constexpr int kReaders = 4 * kHopperGroups;  // warps
    for (int i = 0; i < kBuffers; ++i) barrier_init(full(i), kFills), barrier_init(free(i), kReaders);
    barrier_init(queries_ready(), kFills);
    barrier_init(queries_free(), kReaders);
    for (int parity = 0; parity < 2; ++parity) barrier_init(tile_done(parity), kReaders);
    barrier_publish();
  }

  // A buffer is filled by the copies of every loading thread, and by what the first of them arrives for: descriptions, or tile loads.
  static constexpr int kFills = kHopperLoaders + 1;
  HA_DEVICE static void arrive_gathered(uint32_t barrier, int thread) {
    barrier_arrive_copied(barrier);
    if (thread == 0) barrier_arrive(barrier);
  }

  // Whether a step's keys are gathered row by row: listed ones, and runs that pass the length but not the tensor's end.
  HA_DEVICE static bool gathers(const Step& step, int length, int seq_k) {
    return !Walk::kConsecutive || step.listed() || (length != seq_k && max(step.lower, step.upper) + kTileKeys > length);
  }

  // Turns logits into base 2.
  HA_DEVICE float factor(const Geometry& g) const {
    return (g.a.scale > 0.0f ? g.a.scale : 1.0f / sqrtf(float(g.head_dim))) * kHopperLog2E;
  }
};

}  // namespace ha
