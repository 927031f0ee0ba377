// What one warp group keeps in registers of its 64 query rows, and its products: online softmax over steps of keys. In the layout of the
// accumulators, thread 32 w + 4 r + t of the group holds rows 16 w + r and 16 w + r + 8 and columns 8 i + 2 t, 8 i + 2 t + 1 of each.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <class T, int P>
struct GroupState {
  static constexpr int kKeys = hopper_table(P).keys, kRows = hopper_table(P).rows();

  float o[P / 2];
  float logits[kKeys / 2];     // of the current step
  uint32_t p[kKeys / 4];       // probabilities of the step whose values are added
  float largest[2], sum[2];    // of each row: running maximum (base 2) and this thread's part of the sum
  float keep[2];               // what the current step leaves of o

  HA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -INFINITY, sum[i] = 0.0f;
  }

  // Starts logits = Q K^T. `queries` = the group's first row, `keys` = the buffer's.
  HA_DEVICE void start_keys(uint32_t queries, uint32_t keys) {
    const Matrix a(queries, 16, 1024), b(keys, 16, 1024);
    fence_registers(logits);
    product_begin();
#pragma unroll
    for (int k = 0; k < P / 16; ++k)
      multiply_shared<T>(logits, a.at(k / 4 * (kRows * 128) + k % 4 * 32), b.at(k / 4 * (kKeys * 128) + k % 4 * 32), k > 0);
    product_commit();
  }

  // Starts o += P V.
  HA_DEVICE void start_values(uint32_t values) {
    const Matrix b(values, kKeys * 128, 1024);
    fence_registers(o);
    product_begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) multiply_registers<T>(o, p + 4 * k, b.at(k * 16 * 128));
    product_commit();
  }

  // Logits become probabilities; `factor` turns logits into base 2.
  HA_DEVICE void softmax(float factor) {
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kChains = 4;
      float most[kChains];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float pair = fmaxf(logits[4 * i + 2 * half], logits[4 * i + 2 * half + 1]);
        most[i % kChains] = i < kChains ? pair : fmaxf(most[i % kChains], pair);
      }
      top[half] = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], shuffle_xor(top[half], mask));
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half] * factor, largest[half]);
      base[half] = top[half] == -INFINITY ? 0.0f : top[half];  // a row that has seen nothing stays at zero, not NaN
      keep[half] = exp2_fast(largest[half] - base[half]);
      largest[half] = top[half];
    }
    float total[2][2] = {};
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        logits[i + e] = exp2_fast(fmaf(logits[i + e], factor, -base[i / 2 % 2]));
        total[i / 2 % 2][e] += logits[i + e];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = sum[half] * keep[half] + (total[half][0] + total[half][1]);
  }

  // After the step before has been added: o is scaled for the new maximum, and the probabilities become the left operand.
  HA_DEVICE void take_probabilities() {
    if (ballot(keep[0] != 1.0f || keep[1] != 1.0f)) {  // rare after the first steps
#pragma unroll
      for (int i = 0; i < P / 2; ++i) o[i] *= keep[i / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = pack<T>(logits[2 * i], logits[2 * i + 1]);
  }
};

// Four neighbouring threads each hold one word of each of four 16-byte pieces; afterwards each holds one piece, or the other way round.
HA_DEVICE void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = mask == 1 ? 2 * i : i, high = low + mask;
      const uint32_t other = uint32_t(shuffle_xor(int(upper ? words[low] : words[high]), mask));
      if (upper) words[low] = other;
      else words[high] = other;
    }
  }
}

}  // namespace ha
