// Products of quantised pools on the int8 tensor cores (rule 20): key pools stay in registers and query pools pass by, 8 at a
// time. A and B permute the products' inner index alike, which the sum does not see, so that every load is 16 bytes.
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace ha {

// One tensor's pools of one batch row and head.
struct PoolView {
  const int8_t* values;
  const float* scales;
  int count;

  HA_DEVICE PoolView(const Pools& pools, int64_t slice)
      : values(pools.values + slice * pools.count * pools.stride), scales(pools.scales + slice * pools.count), count(int(pools.count)) {}
};

// Where 16 bytes lie of a pool in shared memory: two neighbouring pools' pieces of one part of 64 bytes meet all banks.
template <int D>
HA_DEVICE int shared_piece(int pool, int piece) {
  return (D % 128 ? piece : piece ^ pool % 2 * 4) * 16;
}

// Eight query pools as B operand: lane 4 g + t holds bytes 16 t.. of each 64 bytes of pool g. D is the pools' stride: the head size,
// filled up with zeros.
template <int D>
struct QueryTile {
  uint32_t words[D / 16];

  // `pool`: this lane's own in shared memory, odd where g is.
  HA_DEVICE void load(const int8_t* pool, int lane) {
#pragma unroll
    for (int part = 0; part < D / 64; ++part) {
      const Words4 x = *reinterpret_cast<const Words4*>(pool + shared_piece<D>(lane / 4, part * 4 + lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) words[part * 4 + i] = x.w[i];
    }
  }
};

// r = 1/sqrt(max(1, q8 . q8)) of two neighbouring query pools, NaN for a pool that is skipped, and what `multiply` adds with it.
struct alignas(16) Factors {
  float r[2], taken[2];
};

// An accumulator that starts from the bits of 2^23 holds, read as a float, 2^23 + dot for dot >= 0 and 2^23 + dot / 2 for dot < 0
// (|dot| <= 127 * 127 * 256 < 2^22), both exact. One fused operation then takes 2^23 away and multiplies by r, rounding once:
// float(dot) r, or half of it where it is negative. Halves keep their order among themselves and below what is not
// negative, so the maximum is doubled at the end. Only where a_k is so small that a score could be subnormal, and its half
// rounded otherwise, does `kCareful` double each product.
constexpr float kMagic = 8388608.0f;
constexpr int32_t kMagicBits = 0x4B000000;
constexpr float kSmallScale = 1e-30f;  // r > 2^-11 and |dot| >= 1 keep halves above this / 2^12

// Factors of the pool in place `column`.
HA_DEVICE void set_factor(Factors* factors, int column, float r) {
  factors[column / 2].r[column % 2] = r;
  factors[column / 2].taken[column % 2] = mul_rn(r, -kMagic);
}

HA_DEVICE float doubled_below_zero(float x) { return add_rn(x, fminf(x, 0.0f)); }

// kTiles times 16 consecutive key pools as A operands. Which pool is which row is free: kLanes neighbouring lanes hold the rows of the
// same 16, so that most of their maximum is taken without other lanes.
template <int D, int kTiles>
struct KeyTiles {
  static constexpr int kLanes = 32 / kTiles;
  uint32_t words[kTiles][D / 32][4];
  float scale[kTiles][2];  // a_k, or NaN
  int first;               // of this lane's pools, which follow each other: 2 t and 2 t + 1 are rows of tile t

  // `start`: the first of the 16 key pools of this lane and its neighbours; those at or past `stop` are skipped.
  HA_DEVICE void load(const PoolView& k, int start, int stop, int lane) {
    first = start + lane % kLanes / 4 * (2 * kTiles);
    if (ballot(first + 2 * kTiles > stop)) load_rows<false>(k, stop, lane);
    else load_rows<true>(k, stop, lane);
  }

  // `kWhole`: no lane has a pool that is skipped.
  template <bool kWhole>
  HA_DEVICE void load_rows(const PoolView& k, int stop, int lane) {
    const int base = kWhole ? first : min(first, k.count - 1), last = k.count - 1 - base;
    const int8_t* const source = k.values + int64_t(base) * D + lane % 4 * 16;
    const float* const scales = k.scales + base;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pool = 2 * t + half, place = kWhole ? pool : min(pool, last);
        const bool inside = kWhole ? first < k.count : first + pool < stop;
        scale[t][half] = load_once(scales + place);
        if (!kWhole && !inside) scale[t][half] = NAN;
#pragma unroll
        for (int part = 0; part < D / 64; ++part) {
          const Words4 x = load16(source + place * D + part * 64);
          // A choice at run time has the compiler arrange the operands here, once, and not before each product.
#pragma unroll
          for (int i = 0; i < 4; ++i) words[t][part * 2 + i / 2][i % 2 * 2 + half] = inside ? x.w[i] : 0;
        }
      }
    }
  }

  HA_DEVICE bool small() const {
    bool any = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) any |= scale[t][0] < kSmallScale || scale[t][1] < kSmallScale;
    return any;
  }

  // best[t][half] = the larger product of this lane's pools with query pools 2 (lane % 4) and the next one, halved below zero. fmaxf
  // drops NaN, the mark of a skipped pool.
  HA_DEVICE void multiply(const QueryTile<D>& queries, const Factors& factors, float (&best)[kTiles][2]) const {
    const int32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
    int32_t c[kTiles][4];
    // Products that follow each other belong to different tiles: none waits for the last one's sum.
#pragma unroll
    for (int step = 0; step < D / 32; ++step) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (step == 0) multiply_add_int8(c[t], words[t][0], queries.words[0], queries.words[1], start);
        else multiply_add_int8(c[t], words[t][step], queries.words[2 * step], queries.words[2 * step + 1]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float product[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) product[i] = fma_rn(bits_float(uint32_t(c[t][i])), factors.r[i % 2], factors.taken[i % 2]);
#pragma unroll
      for (int half = 0; half < 2; ++half) best[t][half] = fmaxf(product[2 * half], product[2 * half + 1]);
    }
  }

  // The same of two operands: this lane's query pool, `pool`, and the one kNext behind it.
  template <int kNext>
  HA_DEVICE void multiply_two(const int8_t* pool, const Factors* factors, int lane, float (&best)[kTiles][2]) const {
    float product[2][kTiles][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      QueryTile<D> queries;
      queries.load(pool + n * kNext * D, lane);
      multiply(queries, factors[n * kNext / 2], product[n]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) best[t][half] = fmaxf(product[0][t][half], product[1][t][half]);
    }
  }

  // The largest score of the products `best` (rule 20; a_k > 0 lets its two maxima be taken in any order) over the rows of
  // the kLanes lanes, halved below zero unless kCareful; NaN if there is none. Pools at or past `stop` take no part if kCareful.
  template <bool kCareful>
  HA_DEVICE float score(const float (&best)[kTiles][2], int stop) const {
    float largest[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = mul_rn(kCareful ? doubled_below_zero(best[t][half]) : best[t][half], scale[t][half]);
        if (kCareful && first + 2 * t + half >= stop) x = -INFINITY;
        largest[t] = half ? fmaxf(largest[t], x) : x;
      }
    }
#pragma unroll
    for (int other = kTiles / 2; other; other /= 2) {
#pragma unroll
      for (int t = 0; t < other; ++t) largest[t] = fmaxf(largest[t], largest[t + other]);
    }
    float value = largest[0];
#pragma unroll
    for (int bit = kLanes / 2; bit >= 4; bit /= 2) value = fmaxf(value, shuffle_xor(value, bit));
    return value;
  }
};

}  // namespace ha
