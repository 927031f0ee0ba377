// What one warp group keeps in registers of its 64 query rows, and its products: online softmax over steps of keys. In the layout of the
// accumulators, thread 32 w + 4 r + t of the group holds rows 16 w + r and 16 w + r + 8 and columns 8 i + 2 t, 8 i + 2 t + 1 of each.
#pragma once
#include "sm90_config.h"
#include "sm90_device.cuh"
#include "walk.cuh"

namespace ha {

template <class T, int P>
struct GroupState {
  static constexpr int kColumnBytes = kHopperKeys * 128;  // from one 64-element column of keys or values to the next

  float o[P / 2];
  float logits[kHopperKeys / 2];    // of the current step
  uint32_t p[kHopperKeys / 4];      // probabilities of the step before
  float largest[2], sum[2];         // of each row: running maximum (base 2) and this thread's part of the sum
  float keep[2];                    // what the step before leaves of o

  HA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -INFINITY, sum[i] = 0.0f;
  }

  // Starts logits = Q K^T. `queries` = the group's first row, `keys` = the buffer's.
  HA_DEVICE void start_keys(uint32_t queries, uint32_t keys) {
    const uint64_t a = matrix(queries, 16, 1024), b = matrix(keys, 16, 1024);
    fence_registers(logits);
    product_begin();
#pragma unroll
    for (int k = 0; k < P / 16; ++k) {
      const int offset = k / 4 * kColumnBytes + k % 4 * 32;
      multiply_shared<T>(logits, matrix_at(a, offset), matrix_at(b, offset), k > 0);
    }
    product_commit();
  }

  // Starts o += P V.
  HA_DEVICE void start_values(uint32_t values) {
    const uint64_t b = matrix(values, kColumnBytes, 1024);
    fence_registers(o);
    product_begin();
#pragma unroll
    for (int k = 0; k < kHopperKeys / 16; ++k) multiply_registers<T>(o, p + 4 * k, matrix_at(b, k * 16 * 128));
    product_commit();
  }

  // Logits become probabilities; `factor` turns logits into base 2.
  HA_DEVICE void softmax(float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kHopperKeys / 8; ++i) top = fmaxf(top, fmaxf(logits[4 * i + 2 * half], logits[4 * i + 2 * half + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      top = fmaxf(top * factor, largest[half]);
      const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen nothing stays at zero, not NaN
      keep[half] = exp2_fast(largest[half] - base);
      largest[half] = top;
      float total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kHopperKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = logits[4 * i + 2 * half + e];
          x = exp2_fast(fmaf(x, factor, -base));
          total[e] += x;
        }
      }
      sum[half] = sum[half] * keep[half] + (total[0] + total[1]);
    }
  }

  // After the step before has been added: o is scaled for the new maximum, and the probabilities become the left operand.
  HA_DEVICE void take_probabilities() {
#pragma unroll
    for (int i = 0; i < P / 2; ++i) o[i] *= keep[i / 2 % 2];
#pragma unroll
    for (int i = 0; i < kHopperKeys / 4; ++i) p[i] = pack<T>(logits[2 * i], logits[2 * i + 1]);
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
