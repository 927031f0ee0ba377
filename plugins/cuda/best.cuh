// The `count` best of `size` scores in shared memory by one warp, in ascending index, ties to the smaller index (rule 21).
#pragma once
#include "device.cuh"

namespace ha {

// Scores become words of the same order, so that thresholds are guessed between two of them; 0 is below every score.
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

// What is taken: all scores above `score`, and of those equal to it the first `ties`.
struct Threshold {
  uint32_t score;
  int ties;
};

// That of the `count` best of more than `count` scores, or of all that are not 0. Any guess that lies between the two bounds does; where
// scores are spread as sums are, the logarithm of odds is nearly linear in them, and few guesses are needed.
HA_DEVICE Threshold find_threshold(const uint32_t* scores, int size, int count, int lane) {
  uint32_t least = ~0u, most = 0;  // least: less one, zeros left out
  int present = 0;
#pragma unroll 4
  for (int i = lane; i < size; i += 32) {
    const uint32_t score = scores[i];
    most = max(most, score), least = min(least, score - 1);
    if (score) ++present;
  }
  if (warp_sum(present) <= count) return {1, size};
  const auto odds = [&](int reached) { return log2_fast(float(reached) + 0.5f) - log2_fast(float(size - reached) + 0.5f); };
  const float wanted = odds(count);
  uint32_t low = ~warp_max(~least) + 1, high = warp_max(most) + 1;  // at least `count` scores reach `low`, fewer reach `high`
  int above = 0;                                                    // that reach `high`
  float odds_low = odds(size), odds_high = odds(0);
  for (int guesses = 1; high - low > 1; ++guesses) {
    const uint32_t range = high - low;
    // Every third time in the middle, whatever scores are like.
    const float part = guesses % 3 ? (odds_low - wanted) / (odds_low - odds_high) : 0.5f;
    const uint32_t guess = low + max(1u, min(uint32_t(float(range) * part), range - 1));
    const int reached = count_at_least(scores, size, guess, lane);
    if (reached == count) return {guess, size};
    if (reached > count) low = guess, odds_low = odds(reached);
    else high = guess, odds_high = odds(reached), above = reached;
  }
  return {low, count - above};
}

// Visits 32 indices at a time: visit(first index, which of them are chosen, as bits, how many were chosen before). Zeros are not chosen.
// What `visit` writes to scores below first index + 32 is not read again. Returns how many are chosen.
template <class Visit>
HA_DEVICE int visit_best(const uint32_t* scores, int size, int count, int lane, Visit visit) {
  const Threshold threshold = size > count ? find_threshold(scores, size, count, lane) : Threshold{1, size};
  int rank = 0, ties = threshold.ties;
  for (int base = 0; base < size; base += 32) {
    const int index = base + lane;
    const uint32_t score = index < size ? scores[index] : 0;
    uint32_t taken = ballot(index < size && score >= threshold.score);
    if (ties < size) {
      const uint32_t equals = ballot(index < size && score == threshold.score);
      const bool drop = (equals >> lane & 1) && count_bits(equals & ((1u << lane) - 1)) >= ties;
      taken &= ~ballot(drop);
      ties -= count_bits(equals);
    }
    visit(base, taken, rank);
    rank += count_bits(taken);
  }
  return rank;
}

}  // namespace ha
