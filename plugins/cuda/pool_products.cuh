// Products of quantised pools on the int8 tensor cores (rule 20): 16 key pools stay in registers and query pools pass by, 8 at
// a time. A and B permute the products' inner index alike, which the sum does not see, so that every load is 16 bytes.
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

// One pool of eight: lane 4 g + t holds bytes 16 t.. of each 64 bytes of pool g. D is the pools' stride: the head size, filled
// up with zeros.
template <int D>
struct Fragment {
  uint32_t w[D / 16];

  // Pool `first` + lane / 4, or the nearest that is there: what it gives is masked by a factor or scale of NaN.
  HA_DEVICE void load(const PoolView& pools, int first, int lane) {
    const int pool = min(max(first + lane / 4, 0), pools.count - 1);
    const int8_t* source = pools.values + int64_t(pool) * D + lane % 4 * 16;
#pragma unroll
    for (int part = 0; part < D / 64; ++part) {
      const Words4 x = load16(source + part * 64);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[part * 4 + i] = x.w[i];
    }
  }
};

// Where 16 bytes of a pool lie in shared memory: two neighbouring pools' pieces of one part of 64 bytes meet all banks.
template <int D>
HA_DEVICE int shared_place(int pool, int piece) {
  return pool * D + (D % 128 ? piece : piece ^ pool % 2 * 4) * 16;
}

// Pool `lane` / 4 of the eight at `pools` in shared memory.
template <int D>
HA_DEVICE void load_shared(Fragment<D>& fragment, const int8_t* pools, int lane) {
#pragma unroll
  for (int part = 0; part < D / 64; ++part) {
    const Words4 x = *reinterpret_cast<const Words4*>(pools + shared_place<D>(lane / 4, part * 4 + lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment.w[part * 4 + i] = x.w[i];
  }
}

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

// 16 key pools from `first` on as A operand; those at or past `stop` are skipped.
template <int D>
struct KeyTile {
  uint32_t words[D / 32][4];  // of pools lane / 4 and lane / 4 + 8 in turn
  float scale[2];             // a_k, or NaN

  HA_DEVICE void load(const PoolView& k, int first, int stop, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragment<D> row;
      row.load(k, first + half * 8, lane);
      const int pool = first + lane / 4 + half * 8;
      const bool inside = pool < stop;
      scale[half] = inside ? load_once(k.scales + pool) : NAN;
      // A choice at run time also has the compiler arrange the operands here, once, and not before each product.
#pragma unroll
      for (int i = 0; i < D / 16; ++i) words[i / 2][i % 2 * 2 + half] = inside ? row.w[i] : 0;
    }
  }

  HA_DEVICE bool small() const { return scale[0] < kSmallScale || scale[1] < kSmallScale; }
};

// best[t][half] = the larger product of this lane's key pool `half` of tile t with query pools 2 (lane % 4) and the next one, halved
// below zero. fmaxf drops NaN, the mark of a skipped pool.
template <int D, int kTiles>
HA_DEVICE void multiply(const KeyTile<D> (&keys)[kTiles], const Fragment<D>& queries, const Factors& factors, float (&best)[kTiles][2]) {
  const int32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
  int32_t c[kTiles][4];
  // Products that follow each other belong to different tiles: none waits for the last one's sum.
#pragma unroll
  for (int step = 0; step < D / 32; ++step) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (step == 0) multiply_add_int8(c[t], keys[t].words[0], queries.w[0], queries.w[1], start);
      else multiply_add_int8(c[t], keys[t].words[step], queries.w[2 * step], queries.w[2 * step + 1]);
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

// The largest of best[tile] over the lanes that share t = lane % 4, for tile = lane / (32 / kTiles): lanes that differ in the upper
// bits go on with different tiles.
template <int kTiles>
HA_DEVICE float tile_maximum(float (&best)[kTiles], int lane) {
  int bit = 16;
#pragma unroll
  for (int half = kTiles / 2; half; half /= 2, bit /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i)
      best[i] = fmaxf(lane & bit ? best[i + half] : best[i], shuffle_xor(lane & bit ? best[i] : best[i + half], bit));
  }
  float value = best[0];
#pragma unroll
  for (; bit >= 4; bit /= 2) value = fmaxf(value, shuffle_xor(value, bit));
  return value;
}

}  // namespace ha
