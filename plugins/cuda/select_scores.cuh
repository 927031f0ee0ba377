// The two levels of scores (rules 20 and 23): at either one a warp takes key pools into registers and passes the query pools by that
// want them.
#pragma once
#include "best.cuh"
#include "select_shared.cuh"

namespace ha {

// Rule 23's first level: every superblock for all query blocks, whose coarse pools are neighbours.
template <int D>
struct SuperScores {
  static constexpr int kTiles = D <= 128 ? 4 : 2;  // superblocks that a warp scores at once
  static constexpr int kLanes = 32 / kTiles;       // that write the same superblock's scores
  static_assert(kSuperblock / kCoarsePool == 16, "a superblock is a tile");

  const SelectConfig& c;
  const Shared& shared;
  int block0, blocks;  // query blocks of this round
  KeyTile<D> keys[kTiles];

  // Passes the query pools by. `kCareful`: scales are small, or the candidates of a query block end inside a superblock.
  template <bool kCareful>
  HA_DEVICE void score(int super, int shift, int lane) {
    const int columns = blocks << shift, pool0 = (int(c.first_unit) + super) * 16, at = super + lane / kLanes;
    // Of a query block with one coarse pool each column is a block of its own: the even ones first, then the odd ones.
    for (int odd = 0; odd < (shift ? 1 : 2); ++odd) {
      for (int column = 0; column < columns; column += 8) {
        Fragment<D> queries;
        load_shared(queries, shared.queries_coarse + column * D, lane);
        const int mine = column + lane % 4 * 2 + odd, i = mine >> shift;
        Factors factors = shared.coarse[column / 2 + lane % 4];
        if (!shift) factors.r[1 - odd] = NAN;
        float product[kTiles][2], best[kTiles];
        multiply(keys, queries, factors, product);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // a_k > 0 lets the two maxima of rule 20 be taken in any order.
            float& x = product[t][half];
            x = mul_rn(kCareful ? doubled_below_zero(x) : x, keys[t].scale[half]);
            if (kCareful && mine < columns && pool0 + t * 16 + half * 8 + lane / 4 >= shared.blocks[block0 + i].pools) x = -INFINITY;
          }
          best[t] = fmaxf(product[t][0], product[t][1]);
        }
        float value = fmaxf(tile_maximum(best, lane), -INFINITY);
        if (shift >= 2) value = fmaxf(value, shuffle_xor(value, 1));
        if (shift >= 3) value = fmaxf(value, shuffle_xor(value, 2));
        if (!kCareful) value = doubled_below_zero(value);
        const bool writes = lane % kLanes < 4 && !(mine & ((1 << shift) - 1) & 7) && mine < columns;
        if (writes && at < shared.blocks[block0 + i].scored) max_atomic(shared.area + i * c.stride + at, ordered(value));
      }
    }
  }

  HA_DEVICE void run(const PoolView& k, int warp, int warps, int lane) {
    int shift = 0;  // coarse pools a query block = 1 << shift
    while (1 << shift < c.coarse) ++shift;
    const SelectBlock block = lane < blocks ? shared.blocks[block0 + lane] : SelectBlock{};
    const int supers = int(warp_max(block.scored));
    for (int super = warp * kTiles; super < supers; super += warps * kTiles) {
      const int pool0 = (int(c.first_unit) + super) * 16;
      bool careful = block.scored && block.pools % 16 && block.pools > pool0 && block.pools < pool0 + kTiles * 16;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        keys[t].load(k, pool0 + t * 16, k.count, lane);
        careful |= keys[t].small();
      }
      if (ballot(careful)) score<true>(super, shift, lane);
      else score<false>(super, shift, lane);
    }
  }
};

// The key blocks of each unit for the query blocks that keep it.
template <int D>
struct UnitScores {
  static constexpr int kTiles = D <= 64 ? 4 : D <= 128 ? 2 : 1;  // of 16 key pools in registers
  static constexpr int kLanes = 32 / kTiles;                     // that hold the same tile's score in the end

  const SelectConfig& c;
  const Shared& shared;
  KeyTile<D> keys[kTiles];

  // Passes the 16 query pools in place `column` by: best[t] = the largest product with this lane's key pools of tile t, if any.
  template <bool kCareful>
  HA_DEVICE void pass(int column, int lane, float (&best)[kTiles]) const {
    float product[2][kTiles][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      Fragment<D> queries;
      load_shared(queries, shared.queries + (column + n * 8) * D, lane);
      multiply(keys, queries, shared.fine[column / 2 + n * 4 + lane % 4], product[n]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float most = fmaxf(product[0][t][half], product[1][t][half]);
        product[0][t][half] = mul_rn(kCareful ? doubled_below_zero(most) : most, keys[t].scale[half]);
      }
      best[t] = fmaxf(product[0][t][0], product[0][t][1]);
    }
  }

  // Passes the pools of the `wanted` query blocks by; `rank`: of the unit among those of query block `lane` in this pass; `block0`: its
  // first key block, `mine`: the one behind it whose score this lane has in the end. `kCareful`: scales are small.
  template <bool kCareful>
  HA_DEVICE void score(uint32_t wanted, int rank, int block0, int mine, int lane) {
    // Other blocks of a kept superblock are no candidates, and stay below every score.
    const bool writes = lane % kLanes == 0 && mine < 1 << c.shift && block0 + mine >= c.start;
    for (; wanted; wanted &= wanted - 1) {
      const int i = count_bits(~wanted & (wanted - 1));
      float best[kTiles];
      pass<kCareful>(i * c.fine, lane, best);
      for (int column = 16; column < c.fine; column += 16) {  // more than 16 pools a query block
        float more[kTiles];
        pass<kCareful>(i * c.fine + column, lane, more);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) best[t] = fmaxf(best[t], more[t]);
      }
      float value = fmaxf(tile_maximum(best, lane), -INFINITY);
      value = fmaxf(value, shuffle_xor(value, 1));
      value = fmaxf(value, shuffle_xor(value, 2));
      if (!kCareful) value = doubled_below_zero(value);
      const int place = shuffle(rank, i) << c.shift;
      if (writes && block0 + mine < shared.blocks[i].stop) max_atomic(shared.area + i * c.row + c.carried + place + mine, ordered(value));
    }
  }

  // Units of rank `rank0` to rank0 + window of each query block.
  HA_DEVICE void run(const PoolView& k, int per_block, int rank0, int lane) {
    const int block_tiles = c.fine / 16, units = int(warp_max(lane < c.blocks ? shared.blocks[lane].units : 0));
    // Units differ in how many query blocks keep them: each warp takes the next one that is left, one ahead.
    const auto take = [&] { return int(warp_max(lane == 0 ? fetch_add_atomic(shared.next, 1) : 0)); };
    for (int unit = take(), next; unit < units; unit = next) {
      next = take();
      const int word = (lane < c.blocks ? lane : 0) * int(c.words) + unit / 32, bit = unit % 32;
      const uint32_t mask = shared.masks[word];
      const int rank = (c.supers ? shared.before[word] : unit - bit) + count_bits(mask & ((1u << bit) - 1)) - rank0;
      const uint32_t wanted = ballot(lane < c.blocks && (mask >> bit & 1) && rank >= 0 && rank < c.window);
      if (!wanted) continue;
      const int block0 = (int(c.first_unit) + unit) << c.shift;
      for (int block = 0, part = 0; block < 1 << c.shift;) {
        bool small = false;
        int mine = 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int first = (block0 + block) * per_block, stop = block < 1 << c.shift ? min(first + per_block, k.count) : 0;
          keys[t].load(k, first + part * 16, stop, lane);
          small |= keys[t].small();
          if (lane / kLanes == t) mine = block;
          if (++part == block_tiles) part = 0, ++block;
        }
        if (ballot(small)) score<true>(wanted, rank, block0, mine, lane);
        else score<false>(wanted, rank, block0, mine, lane);
      }
    }
  }
};

}  // namespace ha
