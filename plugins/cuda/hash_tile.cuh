// How a warp hashes 32 rows (rules 26 and 27). Tensor cores add up the signed elements and, beside them, the elements' sizes, which
// bound how far such a sum can be from the rule's. A row with a sum whose sign is in doubt is added up again in the rule's order.
#pragma once
#include <type_traits>

#include "elements.cuh"
#include "sort_config.h"

namespace ha {

constexpr int kHashGroups = kHashTileRows / 16;  // of rows: one operand each, of which lane l has rows l / 4 and l / 4 + 8

// fp32 becomes three bfloat16 that add up to it, each of which goes through the tensor cores.
template <class T>
using HashOperand = std::conditional_t<sizeof(T) == 4, Bfloat16, T>;
template <class T>
constexpr int kHashTerms = sizeof(T) == 4 ? 3 : 1;
template <class T>
constexpr uint32_t kHashOnes = std::is_same_v<T, Half> ? 0x3C003C00u : 0x3F803F80u;

// In shared memory: the words of rule 26, and of each piece and projection the signs in a piece's layout.
template <class T, int kProjections>
HA_DEVICE void write_signs(const Geometry& g, uint32_t* words, Words4* signs, int pieces) {
  constexpr int kPairs = kPieceElements<T> / 2;
  for (int d = thread_index(); d < g.head_dim; d += kHashThreads) words[d] = sign_word(d, g.a.seed);
  sync_block();
  for (int at = thread_index(); at < pieces * kProjections; at += kHashThreads) {
    const int t = at % kProjections, d = at / kProjections * kPieceElements<T>;
    Words4 piece{};
    for (int pair = 0; pair < kPairs && d + 2 * pair < g.head_dim; ++pair)
      piece.w[pair] = kHashOnes<T> | (words[d + 2 * pair] >> t & 1u) << 15 | (words[d + 2 * pair + 1] >> t & 1u) << 31;
    signs[at] = piece;
  }
  sync_block();
}

// The code of one row as rule 26 adds it up; lane t has projection t, whose sum has to be above `least`.
template <class T>
HA_DEVICE uint32_t exact_code(const char* row, int pieces, const uint32_t* words, float least, int lane) {
  float sum = 0.0f;
  for (int piece = 0; piece < pieces; ++piece) {
    float x[kPieceElements<T>];
    unpack<T>(load16(row + piece * 16), x);
#pragma unroll
    for (int i = 0; i < kPieceElements<T>; ++i)
      sum = add_rn(sum, bits_float(float_bits(x[i]) ^ words[piece * kPieceElements<T> + i] >> lane << 31));
  }
  return ballot(sum > least);
}

// A lane's sums: of each group's two rows those of projections 2 (lane % 4) and the next, of every 8.
template <class T, int kTiles>
struct HashSums {
  float sum[kHashGroups][kTiles][4] = {}, size[kHashGroups][4] = {};

  // Adds one piece of each of the lane's two rows of a group. Where an element stands in the operand does not matter as long as its
  // signs stand there too.
  HA_DEVICE void add(int group, const Words4& low, const Words4& high, const Words4 (&signs)[kTiles]) {
    if constexpr (sizeof(T) == 4) {
      float x[2][4];
      unpack<T>(low, x[0]);
      unpack<T>(high, x[1]);
#pragma unroll
      for (int term = 0; term < kHashTerms<T>; ++term) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* const pair = x[i % 2] + i / 2 * 2;
          const uint32_t first = float_bits(pair[0]) & 0xFFFF0000u, second = float_bits(pair[1]) & 0xFFFF0000u;
          a[i] = first >> 16 | second;
          pair[0] -= bits_float(first);  // exact, as are the terms: 8 of 24 bits each
          pair[1] -= bits_float(second);
        }
        multiply(group, a, 0, term == 0, signs);
      }
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply(group, {low.w[2 * step], high.w[2 * step], low.w[2 * step + 1], high.w[2 * step + 1]}, step, true, signs);
    }
  }

  // The code of row lane / 4 + 8 (lane % 4), and whether some row's is in doubt: bit h of `doubtful` for row lane / 4 + 8 h. `above`, in
  // shared memory, is what each projection's sum has to be above.
  HA_DEVICE uint32_t code(int lane, int head_dim, int projections, const float* above, uint32_t* doubtful) const {
    // How far a sum and the rule's may be apart, in units of the sum of sizes: tensor cores add "with at least single precision", hence
    // at most 2^-23 an addition, of 17 for 16 elements, and the rule's own 2^-24. That holds between the ends of fp32's range only.
    const float doubt = float(head_dim * (kHashTerms<T> + 1)) * 0x1p-22f, least = 1e-30f, most = 1e37f;
    uint32_t bits[kTiles] = {};  // byte h: row lane / 4 + 8 h
    *doubtful = 0;
#pragma unroll
    for (int h = 0; h < 2 * kHashGroups; ++h) {
      const float sizes = size[h / 2][h % 2 * 2], bound = sizes < most ? sizes * doubt + least : INFINITY;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int projection = lane % 4 * 2 + e;
          const float x = sum[h / 2][t][h % 2 * 2 + e] - above[t * 8 + projection];
          bits[t] |= uint32_t(x > 0.0f) << (8 * h + projection);
          *doubtful |= uint32_t(t * 8 + projection < projections && !(fabsf(x) > bound)) << h;
        }
    }
    uint32_t code = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      for (int mask = 1; mask < 4; mask *= 2) bits[t] |= uint32_t(shuffle_xor(int(bits[t]), mask));
      code |= (bits[t] >> (8 * (lane % 4)) & 0xFFu) << (8 * t);
    }
    return code;
  }

 private:
  HA_DEVICE void multiply(int group, const uint32_t (&a)[4], int step, bool sized, const Words4 (&signs)[kTiles]) {
    using Operand = HashOperand<T>;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) multiply_add<Operand>(sum[group][t], a, signs[t].w[2 * step], signs[t].w[2 * step + 1]);
    constexpr uint32_t kSizes = 0x7FFF7FFFu;
    const uint32_t b[4] = {a[0] & kSizes, a[1] & kSizes, a[2] & kSizes, a[3] & kSizes};
    if (sized) multiply_add<Operand>(size[group], b, kHashOnes<T>, kHashOnes<T>);
  }
};

}  // namespace ha
