// What one warp group keeps in registers of its 64 query rows, and its products: online softmax over steps of keys. In the layout of the
// accumulators, thread 32 w + 4 r + t of the group holds rows 16 w + r and 16 w + r + 8 and columns 8 i + 2 t, 8 i + 2 t + 1 of each.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

// The same in all threads of a warp, and known to be: what depends on it alone lies in the warp's registers.
HA_DEVICE uint32_t uniform(uint32_t x) { return uint32_t(shuffle(int(x), 0)); }

// `kBufferRows`: keys of a buffer, of which the products take kKeys.
template <class T, int P, int kKeys, int kRows, int kBufferRows = kKeys>
struct GroupState {
  float o[P / 2];
  float logits[kKeys / 2];     // of the current step
  uint32_t p[kKeys / 4];       // probabilities of the step whose values are added
  float largest[2], sum[2];    // of each row: what its exponentials refer to (base 2) and this thread's part of their sum
  float keep[2];               // what the current step leaves of o, where it raises `largest`

  HA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -INFINITY, sum[i] = 0.0f;
  }

  // What products may have begun with is not kept in registers from one tile to the next.
  HA_DEVICE void clear_step() {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) logits[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = 0;
  }

  // Starts logits = Q K^T, or += where `add`. `queries` = the group's first row, `keys` = the buffer's.
  HA_DEVICE void start_keys(uint32_t queries, uint32_t keys, bool add = false) {
    const Matrix a(queries, 16, 1024), b(keys, 16, 1024);
    fence_registers(logits);
    product_begin();
#pragma unroll
    for (int k = 0; k < P / 16; ++k)
      multiply_shared<T>(logits, a.at(k / 4 * (kRows * 128) + k % 4 * 32), b.at(k / 4 * (kBufferRows * 128) + k % 4 * 32), k > 0 || add);
    product_commit();
  }

  // Starts o += P V.
  HA_DEVICE void start_values(uint32_t values) {
    const Matrix b(values, kBufferRows * 128, 1024);
    fence_registers(o);
    product_begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) multiply_registers<T>(o, p + 4 * k, b.at(k * 16 * 128));
    product_commit();
  }

  // Whether, in a row of this warp, the logits exceed `largest` by so much that it rises; `factor` turns logits into base 2. It follows
  // the maximum with a delay: powers of 2 up to 2^kRise are summed as well as those up to 1, and o is scaled less often. In most steps
  // nothing rises: each thread looks at its own logits, and the warp has one vote.
  HA_DEVICE bool raise(float factor) {
    constexpr float kRise = 8.0f;
    float limit[2], top[2];
    bool above = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      limit[half] = largest[half] + kRise;
      top[half] = highest(half);
      // Without a logit that is not negative, `highest` has found none of the largest; that matters where the limit is negative, too.
      above |= top[half] * factor > limit[half] || int(float_bits(top[half]) & float_bits(limit[half])) < 0;
    }
    if (!ballot(above)) return false;
    find_maxima(top);
    const bool rises[2] = {top[0] * factor > limit[0], top[1] * factor > limit[1]};
    if (!ballot(rises[0] || rises[1])) return false;
    lift(top, rises, factor);
    return true;
  }
  HA_DEVICE void rescale() {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) o[i] *= keep[i / 2 % 2];
  }

  // A row's first step: powers refer to the largest of a few of its logits, unless these are masked.
  HA_DEVICE void refer(float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float lead = fmaxf(logits[2 * half], logits[2 * half + 1]);
      for (int mask = 1; mask < 4; mask *= 2) lead = fmaxf(lead, shuffle_xor(lead, mask));
      if (fabsf(lead) < INFINITY) largest[half] = lead * factor;
    }
  }

  // Logits become probabilities, the left operand of the values' product.
  HA_DEVICE void take_probabilities(float factor) {
    float total[2];
    find_powers(factor, p, total);
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] += total[half];
  }

  // The same without a look at the maxima beforehand: powers refer to what they did before. Where a thread's part of a row's sum shows
  // that logits are far above that, or a row had seen nothing, the reference rises and they are found anew.
  // `values_done` waits for the values of the step before, whose product reads p; kEarly: exponentials do not, for which registers must
  // suffice.
  template <bool kEarly, class Wait>
  HA_DEVICE void take_probabilities(float factor, Wait&& values_done) {
    constexpr float kMost = 16384.0f;  // of fp16, where the largest number is four times that
    uint32_t early[kKeys / 4];
    uint32_t(&powers)[kKeys / 4] = kEarly ? early : p;
    if constexpr (!kEarly) values_done();
    float total[2];
    const auto far_above = [&](int half) { return total[half] > kMost || largest[half] == -INFINITY; };
    bool rises = false;
#pragma unroll 1
    for (;;) {
      find_powers(factor, powers, total);
      if (rises || !ballot(far_above(0) || far_above(1))) break;
      int above[2] = {far_above(0), far_above(1)};  // of the row, to which other rows of the warp must make no difference
      for (int half = 0; half < 2; ++half)
        for (int mask = 1; mask < 4; mask *= 2) above[half] |= shuffle_xor(above[half], mask);
      float top[2];
      find_maxima(top);
      const auto found = [&](int half) { return above[half] != 0 && top[half] != -INFINITY; };
      rises = ballot(found(0) || found(1));  // not where such rows see nothing
      if (!rises) break;
      lift(top, {found(0), found(1)}, factor);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] += total[half];
    if constexpr (kEarly) values_done();
    if (rises) rescale();
    if constexpr (kEarly) {
      // Were these copies to the compiler, it would write p at once, beside the product that reads it, and let all products run one by one.
      const uint32_t zero = settled(0u);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = early[i] | zero;
    }
  }

 private:
  // A row that has seen nothing stays at zero, not NaN.
  HA_DEVICE float base(int half) const { return largest[half] == -INFINITY ? 0.0f : largest[half]; }

  // Powers of the step's logits, as 16-bit pairs, and this thread's part of each row's sum.
  HA_DEVICE void find_powers(float factor, uint32_t (&powers)[kKeys / 4], float (&total)[2]) const {
    const float bases[2] = {base(0), base(1)};
    float totals[2][2] = {};
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      float power[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        power[e] = exp2_fast(fmaf(logits[i + e], factor, -bases[i / 2 % 2]));
        totals[i / 2 % 2][e] += power[e];
      }
      powers[i / 2] = pack<T>(power[0], power[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] = totals[half][0] + totals[half][1];
  }
  // Powers of the rows that rise refer to these maxima from now on.
  HA_DEVICE void lift(const float (&top)[2], const bool (&rises)[2], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = largest[half];
      if (rises[half]) largest[half] = fmaxf(before, top[half] * factor);
      keep[half] = exp2_fast(before - base(half));
      sum[half] *= keep[half];
    }
  }

  // Floats that are not negative are ordered as their bits are, of which three are compared at once: the largest of this thread's
  // logits of a row, or a negative one where all are.
  HA_DEVICE float highest(int half) const {
    constexpr int kChains = 4;
    int most[kChains];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const int x = int(float_bits(logits[4 * i + 2 * half])), y = int(float_bits(logits[4 * i + 2 * half + 1]));
      most[i % kChains] = i < kChains ? max(x, y) : max(max(most[i % kChains], x), y);
    }
    return bits_float(uint32_t(max(max(most[0], most[1]), max(most[2], most[3]))));
  }
  HA_DEVICE void find_maxima(float (&top)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = -INFINITY;
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) top[half] = fmaxf(top[half], logits[i / 2 * 4 + 2 * half + i % 2]);
      for (int mask = 1; mask < 4; mask *= 2) top[half] = fmaxf(top[half], shuffle_xor(top[half], mask));
    }
  }
};

// Behind the last step that a tile has for the group: the step's values are added, their buffer is freed.
template <class Block, class State, class Place>
HA_DEVICE void drain(const Block& block, State& state, const Place& values, int thread) {
  barrier_wait(block.full(values.index), values.phase);
  state.start_values(block.buffer(values.index));
  product_wait<0>();
  fence_registers(state.o);
  release(block.free(values.index), thread);
}

// Four neighbouring threads each hold one word of each of four 16-byte pieces; afterwards each holds one piece, or the other way round. The
// same for kCount such fours, whose exchanges do not wait for each other.
template <int kCount>
HA_DEVICE void transpose_quads(Words4 (&pieces)[kCount], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool upper = lane & mask;
    uint32_t other[kCount][2];
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int low = mask == 1 ? 2 * i : i, high = low + mask;
        other[n][i] = uint32_t(shuffle_xor(int(upper ? pieces[n].w[low] : pieces[n].w[high]), mask));
      }
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int low = mask == 1 ? 2 * i : i, high = low + mask;
        if (upper) pieces[n].w[low] = other[n][i];
        else pieces[n].w[high] = other[n][i];
      }
  }
}

}  // namespace ha
