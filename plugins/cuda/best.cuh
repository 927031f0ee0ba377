// The `count` best of `size` scores in shared memory by one warp, in ascending index, ties to the smaller index (rule 21).
#pragma once
#include "device.cuh"

namespace ha {

// Scores become words of the same order, so that thresholds are found bit by bit; 0 is below every score.
HA_DEVICE uint32_t ordered(float score) {
  if (score != score) score = -INFINITY;
  const uint32_t bits = float_bits(add_rn(score, 0.0f));  // -0 and 0 are one score
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

HA_DEVICE int count_at_least(const uint32_t* scores, int size, uint32_t threshold, int lane) {
  int count = 0;
  for (int i = lane; i < size; i += 32) count += scores[i] >= threshold;
  return warp_sum(count);
}

// Calls emit(rank, index) once for each chosen index; `count` may pass `size`.
template <class Emit>
HA_DEVICE void keep_best(const uint32_t* scores, int size, int count, int lane, Emit emit) {
  uint32_t threshold = 0;  // the largest word that at least `count` scores reach
  int reached = size;
  if (size > count) {
    for (uint32_t bit = 0x80000000u; bit && reached != count; bit >>= 1) {
      const int more = count_at_least(scores, size, threshold | bit, lane);
      if (more >= count) threshold |= bit, reached = more;
    }
  }
  // Of the scores that equal the threshold only the first ones fit.
  int ties = reached <= count ? size : count - count_at_least(scores, size, threshold + 1, lane);
  int rank = 0;
  for (int base = 0; base < size; base += 32) {
    const int index = base + lane;
    const uint32_t score = index < size ? scores[index] : 0;
    const bool equal = index < size && score == threshold;
    const uint32_t before = (1u << lane) - 1, equals = ballot(equal);
    const bool take = index < size && (score > threshold || (equal && count_bits(equals & before) < ties));
    const uint32_t taken = ballot(take);
    if (take) emit(rank + count_bits(taken & before), index);
    ties -= count_bits(equals);
    rank += count_bits(taken);
  }
}

}  // namespace ha
