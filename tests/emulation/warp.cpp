// Operations that the 32 lanes of a warp do together, and the formats of numbers.
#include <type_traits>

#include "machine.h"

namespace ha {
namespace {

constexpr uint32_t kBelowTf32 = 0x1fff;  // bits of an fp32 word that a TF32 product ignores

Warp& warp() { return block.warps[block.current / kWarp]; }
Lane& lane() { return warp().lanes[block.current % kWarp]; }

// All lanes of a warp give `in`; `compute` fills every lane's `out`.
template <class Compute>
void warp_operation(Compute compute) {
  meet(warp().meeting, kWarp, "the other lanes of warp", block.current / kWarp, [&] { compute(warp().lanes); });
}

float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}
uint16_t float_to_half(float x) {
  const _Float16 y = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Element i (0 or 1) of a word of 16-bit floats.
template <class T>
float element(uint32_t word, int i) {
  return to_float(T{uint16_t(word >> (16 * i))});
}
int byte(uint32_t word, int i) { return int8_t(word >> (8 * i)); }

// c = a b + c for fragments of `kPerWord` elements a word: rows and columns of the operands as in the PTX manual, with
// g = lane / 4 and t = lane % 4: A word w holds row g + 8 (w % 2), columns kPerWord t .. of half w / 2; B word w holds
// column g, rows kPerWord t .. of half w; C element e holds row g + 8 (e / 2), column 2 t + e % 2.
// The sum is as the tensor cores form it: exact up to double, then rounded towards zero.
template <int kPerWord, class C, class Multiply>
void matrix_product(Lane* lanes, Multiply multiply) {
  for (int l = 0; l < kWarp; ++l) {
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + 8 * (e / 2), column = l % 4 * 2 + e % 2;
      C c;
      std::memcpy(&c, &lanes[l].in[8 + e], 4);
      std::conditional_t<std::is_same_v<C, float>, double, C> sum = c;
      for (int half = 0; half < 2; ++half)
        for (int t = 0; t < 4; ++t)
          for (int i = 0; i < kPerWord; ++i) {
            const uint32_t a = lanes[row % 8 * 4 + t].in[row / 8 + 2 * half], b = lanes[column * 4 + t].in[4 + half];
            sum += multiply(a, b, i);
          }
      if constexpr (std::is_same_v<C, float>) c = round_to_zero(sum);
      else c = sum;
      std::memcpy(&lanes[l].out[e], &c, 4);
    }
  }
}

template <class C>
void give(const C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::memcpy(lane().in, a, 16);
  lane().in[4] = b0;
  lane().in[5] = b1;
  std::memcpy(lane().in + 8, c, 16);
}

void matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  require_shared(address, 16, 16, "ldmatrix outside shared memory");
  lane().in[0] = address;
  warp_operation([transposed](Lane* lanes) {
    for (int m = 0; m < 4; ++m)
      for (int l = 0; l < kWarp; ++l) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = transposed ? l % 4 * 2 + i : l / 4, column = transposed ? l / 4 : l % 4 * 2 + i;
          std::memcpy(&pair[i], block.base + lanes[m * 8 + row].in[0] + column * 2, 2);
        }
        lanes[l].out[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
      }
  });
  std::memcpy(r, lane().out, 16);
}

}  // namespace

void sync_warp() { warp_operation([](Lane*) {}); }
void load_matrices(uint32_t (&r)[4], uint32_t address) { matrices(r, address, false); }
void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { matrices(r, address, true); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  give(c, a, b0, b1);
  warp_operation([](Lane* lanes) {
    matrix_product<2, float>(lanes, [](uint32_t x, uint32_t y, int i) { return double(element<T>(x, i)) * element<T>(y, i); });
  });
  std::memcpy(c, lane().out, 16);
}
template void multiply_add<Half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_add<Bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  give(c, a, b0, b1);
  warp_operation([](Lane* lanes) {
    matrix_product<1, float>(lanes, [](uint32_t x, uint32_t y, int) { return double(bits_float(x & ~kBelowTf32)) * bits_float(y & ~kBelowTf32); });
  });
  std::memcpy(c, lane().out, 16);
}
uint32_t round_tf32(float x) {
  const uint32_t bits = float_bits(x);
  const bool finite = (bits >> 23 & 0xff) != 0xff;
  return (finite ? bits + (kBelowTf32 + 1) / 2 : bits) & ~kBelowTf32;  // ties away from zero
}

void multiply_add_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  give(c, a, b0, b1);
  warp_operation([](Lane* lanes) { matrix_product<4, int32_t>(lanes, [](uint32_t x, uint32_t y, int i) { return byte(x, i) * byte(y, i); }); });
  std::memcpy(c, lane().out, 16);
}

int shuffle_xor(int x, int mask) {
  lane().in[0] = uint32_t(x);
  lane().in[1] = uint32_t(mask);
  warp_operation([](Lane* lanes) {
    for (int l = 0; l < kWarp; ++l) lanes[l].out[0] = lanes[l ^ int(lanes[l].in[1])].in[0];
  });
  return int(lane().out[0]);
}
float shuffle_xor(float x, int mask) { return bits_float(uint32_t(shuffle_xor(int(float_bits(x)), mask))); }
int shuffle(int x, int from) {
  lane().in[0] = uint32_t(x);
  lane().in[1] = uint32_t(from);
  warp_operation([](Lane* lanes) {
    for (int l = 0; l < kWarp; ++l) lanes[l].out[0] = lanes[lanes[l].in[1] % kWarp].in[0];
  });
  return int(lane().out[0]);
}
uint32_t ballot(bool x) {
  lane().in[0] = x;
  warp_operation([](Lane* lanes) {
    uint32_t word = 0;
    for (int l = 0; l < kWarp; ++l) word |= lanes[l].in[0] << l;
    for (int l = 0; l < kWarp; ++l) lanes[l].out[0] = word;
  });
  return lane().out[0];
}
uint32_t warp_max(uint32_t x) {
  lane().in[0] = x;
  warp_operation([](Lane* lanes) {
    uint32_t most = 0;
    for (int l = 0; l < kWarp; ++l) most = max(most, lanes[l].in[0]);
    for (int l = 0; l < kWarp; ++l) lanes[l].out[0] = most;
  });
  return lane().out[0];
}
int warp_sum(int x) {
  lane().in[0] = uint32_t(x);
  warp_operation([](Lane* lanes) {
    uint32_t sum = 0;
    for (int l = 0; l < kWarp; ++l) sum += lanes[l].in[0];
    for (int l = 0; l < kWarp; ++l) lanes[l].out[0] = sum;
  });
  return int(lane().out[0]);
}

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
float to_float(Bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
float to_float(Half x) { return half_to_float(x.bits); }
template <>
uint32_t pack<Bfloat16>(float low, float high) {
  return uint32_t(float_to_bfloat16(low)) | uint32_t(float_to_bfloat16(high)) << 16;
}
template <>
uint32_t pack<Half>(float low, float high) {
  return uint32_t(float_to_half(low)) | uint32_t(float_to_half(high)) << 16;
}

}  // namespace ha
