// The `count` best of `size` scores in shared memory by one warp, in ascending index, ties to the smaller index (rule 21).
#pragma once
#include "device.cuh"

namespace ha {

// Scores become words of the same order, so that thresholds are found bit by bit; 0 is below every score.
// Never NaN: scores are maxima, which start from -infinity.
HA_DEVICE uint32_t ordered(float score) {
  const uint32_t bits = float_bits(add_rn(score, 0.0f));  // -0 and 0 are one score
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

HA_DEVICE int count_at_least(const uint32_t* scores, int size, uint32_t threshold, int lane) {
  int count = 0;
#pragma unroll 4
  for (int i = lane; i < size; i += 32) count += scores[i] >= threshold;
  return warp_sum(count);
}

// Visits 32 indices at a time: visit(first index, which of them are chosen, as bits, how many were chosen before). `count` may pass
// `size`; zeros are chosen last. What `visit` writes to scores below first index + 32 is not read again.
template <class Visit>
HA_DEVICE void visit_best(const uint32_t* scores, int size, int count, int lane, Visit visit) {
  uint32_t threshold = 0;  // the largest word that at least `count` scores reach
  int reached = size;
  if (size > count) {
    uint32_t least = ~0u, most = 0;
    int present = 0;
#pragma unroll 4
    for (int i = lane; i < size; i += 32) {
      const uint32_t score = scores[i];
      most = max(most, score);
      if (score) least = min(least, score), ++present;
    }
    int shift = 30;
    if (warp_sum(present) >= count) {  // then bits that all others but zeros have in common are the threshold's, too
      most = warp_max(most);
      const uint32_t differ = most ^ ~warp_max(~least);
      while (shift >= 0 && !(differ >> shift)) shift -= 2;
      threshold = shift < 0 ? most : most >> shift >> 2 << 2 << shift;
    }
    for (; shift >= 0 && reached != count; shift -= 2) {  // two bits a time
      int more[3] = {};
#pragma unroll 4
      for (int i = lane; i < size; i += 32) {
        const uint32_t score = scores[i];
#pragma unroll
        for (int j = 0; j < 3; ++j) more[j] += score >= (threshold | uint32_t(j + 1) << shift);
      }
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        more[j] = warp_sum(more[j]);
        if (more[j] >= count) bits = uint32_t(j + 1), reached = more[j];
      }
      threshold |= bits << shift;
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
    visit(base, taken, rank);
    ties -= count_bits(equals);
    rank += count_bits(taken);
  }
}

}  // namespace ha
