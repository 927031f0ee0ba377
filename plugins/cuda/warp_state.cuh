// What one warp of attention keeps in registers, and its products on the tensor cores: online softmax over steps of keys.
#pragma once
#include "walk.cuh"

namespace ha {

// Byte offset of a 16-byte chunk in a tile of rows of kRowBytes. The exclusive or, within aligned groups of eight chunks (four where a
// row is no multiple of eight), spreads eight rows of ldmatrix over all banks.
template <int kRowBytes>
constexpr int kSwizzle = kRowBytes % 128 ? 3 : 7;
template <int kRowBytes>
HA_DEVICE uint32_t tile_offset(int row, int chunk) {
  const int turn = kSwizzle<kRowBytes> == 7 ? row & 7 : row >> 1 & 3;
  return uint32_t(row * kRowBytes + ((chunk ^ turn) << 4));
}

// The address 2 k chunks to the right of `address`, which lies in chunk 0 or 1 of its row. Tiles begin at multiples of 128 bytes.
template <int kRowBytes>
HA_DEVICE uint32_t next_chunks(uint32_t address, int k) {
  const int chunk = 2 * k, within = chunk & kSwizzle<kRowBytes>;
  return (address ^ uint32_t(within << 4)) + uint32_t((chunk - within) << 4);
}

// Left operand of a product of 32 bytes of inner index: 16 rows of 16 16-bit elements, or of 8 fp32.
template <class T>
struct LeftOperand {
  static constexpr bool kSeparateSums = false;
  uint32_t a[4];

  HA_DEVICE void set(const uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[i];
  }
  HA_DEVICE void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const { multiply_add<T>(c, a, b0, b1); }
};

// fp32 in three TF32 products: x = high + low, and only low x low, below fp32's precision, is left out. Tensor cores round their sums
// towards zero, so sums stay short, small terms come before large ones or apart from them, and ordinary additions join the sums.
template <>
struct LeftOperand<float> {
  static constexpr bool kSeparateSums = true;
  uint32_t high[4], low[4];

  HA_DEVICE static void split(uint32_t word, uint32_t& high, uint32_t& low) {
    high = round_tf32(bits_float(word));
    low = float_bits(bits_float(word) - bits_float(high));
  }
  HA_DEVICE void set(const uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(words[i], high[i], low[i]);
  }
  // The small terms go to `rest`, which may be `c`.
  HA_DEVICE void multiply(float (&c)[4], float (&rest)[4], uint32_t b0, uint32_t b1) const {
    uint32_t high0, low0, high1, low1;
    split(b0, high0, low0);
    split(b1, high1, low1);
    multiply_add_tf32(rest, low, high0, high1);
    multiply_add_tf32(rest, high, low0, low1);
    multiply_add_tf32(c, high, high0, high1);
  }
};

// c += a b, where a sum of its own is kept short if need be.
template <class T>
HA_DEVICE void add_product(float (&c)[4], const LeftOperand<T>& a, uint32_t b0, uint32_t b1) {
  if constexpr (LeftOperand<T>::kSeparateSums) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    a.multiply(part, part, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  } else {
    a.multiply(c, b0, b1);
  }
}

// kWarpRows rows as m16 tiles. In the layout of the accumulators of m16n8k16 and m16n8k8, lane 4 g + t holds rows g and g + 8 and
// columns 2 t and 2 t + 1 of each 16 x 8 tile.
template <class T, int P>
struct WarpState {
  using S = Shape<T, P>;
  static constexpr int kTiles = S::kWarpRows / 16, kRowBytes = S::kRowBytes;
  static constexpr int kInner = 32 / int(sizeof(T));  // inner index of one product

  float o[kTiles][P / 8][4];
  float largest[kTiles][2], sum[kTiles][2];     // of each row: running maximum (base 2) and this lane's part of the sum
  float logits[kTiles][S::kKeys / 8][4];        // of the current step
  LeftOperand<T> p[kTiles][S::kKeys / kInner];  // its probabilities

  HA_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < P / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[m][i] = -INFINITY, sum[m][i] = 0.0f;
    }
  }

  template <int kKeys>
  HA_DEVICE void clear_logits() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[m][n][i] = 0.0f;
  }

  // logits += Q K^T for kKeys keys. `queries` and `keys` are shared-memory addresses of the warp's first row of each. ldmatrix moves
  // 4 bytes a lane, of two elements or of one: rows of either type have the layout that the products want.
  template <int kKeys>
  HA_DEVICE void multiply_keys(uint32_t queries, uint32_t keys, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    const uint32_t query = queries + tile_offset<kRowBytes>(matrix % 2 * 8 + row, matrix / 2);
    const uint32_t key = keys + tile_offset<kRowBytes>(matrix / 2 * 8 + row, matrix % 2);
#pragma unroll
    for (int k = 0; k < P / kInner; ++k) {
      LeftOperand<T> a[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t words[4];
        load_matrices(words, next_chunks<kRowBytes>(query, k) + m * 16 * kRowBytes);
        a[m].set(words);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, next_chunks<kRowBytes>(key, k) + n * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          add_product<T>(logits[m][2 * n], a[m], b[0], b[1]);
          add_product<T>(logits[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Probabilities of the step; `factor` turns logits into base 2.
  template <int kKeys>
  HA_DEVICE void softmax(float factor) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        top = fmaxf(top * factor, largest[m][half]);
        const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen nothing stays at zero, not NaN
        const float keep = exp2_fast(largest[m][half] - base);
        largest[m][half] = top;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            logits[m][n][i] = exp2_fast(fmaf(logits[m][n][i], factor, -base));
            total += logits[m][n][i];
          }
        }
        sum[m][half] = sum[m][half] * keep + total;
#pragma unroll
        for (int n = 0; n < P / 8; ++n) o[m][n][2 * half] *= keep, o[m][n][2 * half + 1] *= keep;
      }
#pragma unroll
      for (int k = 0; k < kKeys / kInner; ++k) set_probabilities(p[m][k], m, k);
    }
  }

  // o += P V; `values` is the shared-memory address of the first value row.
  template <int kKeys>
  HA_DEVICE void multiply_values(uint32_t values, int lane) {
    if constexpr (sizeof(T) == 2) {
      const int matrix = lane / 8, row = lane % 8;
      const uint32_t value = values + tile_offset<kRowBytes>(matrix % 2 * 8 + row, matrix / 2);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
        for (int n = 0; n < P / 16; ++n) {
          uint32_t b[4];
          load_matrices_transposed(b, next_chunks<kRowBytes>(value, n) + k * 16 * kRowBytes);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            p[m][k].multiply(o[m][2 * n], b[0], b[1]);
            p[m][k].multiply(o[m][2 * n + 1], b[2], b[3]);
          }
        }
      }
    } else {
      // Inner index t of a product is key 2 t of its eight, t + 4 is key 2 t + 1: then the accumulators of the logits are the
      // left operand as they are.
      const int row = lane % 4 * 2, chunk = lane / 16, word = lane / 4 % 4 * 4;
      const uint32_t even = values + tile_offset<kRowBytes>(row, chunk) + word;
      const uint32_t odd = values + tile_offset<kRowBytes>(row + 1, chunk) + word;
#pragma unroll
      for (int n = 0; n < P / 8; ++n) {
        float part[kTiles][4] = {}, rest[kTiles][4] = {};
#pragma unroll
        for (int k = 0; k < kKeys / 8; ++k) {
          const uint32_t b0 = load_word(next_chunks<kRowBytes>(even, n) + k * 8 * kRowBytes);
          const uint32_t b1 = load_word(next_chunks<kRowBytes>(odd, n) + k * 8 * kRowBytes);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) p[m][k].multiply(part[m], rest[m], b0, b1);
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] += part[m][i] + rest[m][i];
      }
    }
  }

 private:
  HA_DEVICE void set_probabilities(LeftOperand<T>& operand, int m, int k) const {
    if constexpr (sizeof(T) == 2) {
      // Two neighbouring accumulator tiles are one operand of 16 keys.
#pragma unroll
      for (int i = 0; i < 4; ++i) operand.a[i] = pack<T>(logits[m][2 * k + i / 2][i % 2 * 2], logits[m][2 * k + i / 2][i % 2 * 2 + 1]);
    } else {
      const float(&x)[4] = logits[m][k];
      operand.set({float_bits(x[0]), float_bits(x[2]), float_bits(x[1]), float_bits(x[3])});
    }
  }
};

}  // namespace ha
