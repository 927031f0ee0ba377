// What the sorts of `sortlsh` share: a warp's view of digits and counts.
#pragma once
#include "device.cuh"

namespace ha {

// Lanes with the same digit below kBins, among those where `valid`.
template <int kBins>
HA_DEVICE uint32_t same_digit(int digit, bool valid) {
  uint32_t peers = ballot(valid);
#pragma unroll
  for (int bit = 1; bit < kBins; bit *= 2) {
    const bool set = digit & bit;
    const uint32_t votes = ballot(set);
    peers &= set ? votes : ~votes;
  }
  return peers;
}

// Sum of the lower lanes' counts.
HA_DEVICE uint32_t sum_below(uint32_t count, int lane) {
  uint32_t start = 0;
  // After each step, `count` is the sum over the lane's aligned group and `start` the sum of those before it.
  for (int mask = 1; mask < 32; mask *= 2) {
    const uint32_t other = uint32_t(shuffle_xor(int(count), mask));
    if (lane & mask) start += other;
    count += other;
  }
  return start;
}

}  // namespace ha
