// The walk over what the plan of `blocks` names, where local part and sinks have a launch of their own: in every step each warp group has a
// chosen block of its own query block; then come the samples, which both see.
#pragma once
#include "walk_positions.cuh"

namespace ha {

template <class S>
struct PairWalk : PositionWalk<S> {
  static_assert(S::kWarps == 2 && S::kWarpRows == S::kPairBlock && S::kKeys == S::kPairBlock);

  HA_DEVICE void plan_steps(const Geometry&) {
    this->heavy_steps = max(this->counts[0], this->counts[1]);
    this->total = this->heavy_steps + this->sample_steps();
  }

  HA_DEVICE void describe(int j, Step& step) const {
    if (j >= this->heavy_steps) return this->describe_sample(j - this->heavy_steps, step);
    step.part = Part::kPair;
    step.lower = start_of(0, j);
    step.upper = start_of(1, j);
  }

  // Both groups take part in every step, in turns: one that has no rows, or whose query block has no more blocks, masks all.
  HA_DEVICE Mode mode(const Step& step, int w) const {
    if (step.part == Part::kSample) return Mode::kBiased;
    const int start = w ? step.upper : step.lower;
    const Bounds seen = this->bounds_at(Part::kPair, this->warp_first[w], this->far(this->warp_first[w]));
    return start >= seen.low && start + S::kKeys <= seen.high ? Mode::kPlain : Mode::kMasked;
  }

 private:
  // The first key of query block q's block number `at`, -1 where it has fewer.
  HA_DEVICE int start_of(int q, int at) const {
    return at < this->counts[q] ? this->chosen[q * this->a.num_blocks + at] * S::kPairBlock : -1;
  }
};

}  // namespace ha
