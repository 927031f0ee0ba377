// The two levels of scores (rules 20 and 23): at either one a warp takes key pools into registers and passes the query pools by that
// want them.
#pragma once
#include "best.cuh"
#include "select_shared.cuh"

namespace ha {

// Rule 23's first level: every superblock for all query blocks.
template <int D>
struct SuperScores {
  static constexpr int kTiles = D <= 128 ? 4 : 2;  // superblocks that a warp scores at once
  using Keys = KeyTiles<D, kTiles>;
  static_assert(kSuperblock / kCoarsePool == 16, "a superblock is 16 pools");

  const SelectConfig& c;
  const Shared& shared;
  int block0, blocks;  // query blocks of this round
  Keys keys;

  // Passes four query blocks by at a time: their pools
  // are spread over the columns so that lane % 4 tells its own. `kCareful`:
  // scales are small, or the candidates of a query block end inside a superblock.
  template <bool kCareful>
  HA_DEVICE void score(int super, int lane) {
    const int at = super + lane / Keys::kLanes;
    for (int i0 = 0; i0 < blocks; i0 += 4) {
      const int i = i0 + lane % 4;
      const int8_t* const pool = shared.queries_coarse + ((i0 + lane / 8) * c.spread + lane / 4 % 2) * D;
      const Factors* const factors = shared.coarse + i * c.spread / 2;
      float best[kTiles][2];
      keys.template multiply_two<2>(pool, factors, lane, best);
      for (int part = 4; part < c.spread; part += 4) {  // more than four pools a query block
        float more[kTiles][2];
        keys.template multiply_two<2>(pool + part * D, factors + part / 2, lane, more);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) best[t][0] = fmaxf(best[t][0], more[t][0]), best[t][1] = fmaxf(best[t][1], more[t][1]);
      }
      const SelectBlock* const block = shared.blocks + block0 + min(i, blocks - 1);
      float value = fmaxf(keys.template score<kCareful>(best, kCareful ? block->pools : 0), -INFINITY);
      if (!kCareful) value = doubled_below_zero(value);
      if (lane % Keys::kLanes < 4 && i < blocks && at < block->scored) shared.supers[i * c.stride + at] = ordered(value);
    }
  }

  HA_DEVICE void run(const PoolView& k, int warp, int warps, int lane) {
    const SelectBlock block = lane < blocks ? shared.blocks[block0 + lane] : SelectBlock{};
    const int supers = int(warp_max(block.scored));
    for (int super = warp * kTiles; super < supers; super += warps * kTiles) {
      const int pool0 = (int(c.first_unit) + super) * 16;
      keys.load(k, pool0 + lane / Keys::kLanes * 16, k.count, lane);
      const bool ends = block.scored && block.pools % 16 && block.pools > pool0 && block.pools < pool0 + kTiles * 16;
      if (ballot(ends || keys.small())) score<true>(super, lane);
      else score<false>(super, lane);
    }
  }
};

// The key blocks of each unit for the query blocks that keep it.
template <int D>
struct UnitScores {
  static constexpr int kTiles = D <= 128 ? 4 : 1;  // of 16 key pools in registers
  using Keys = KeyTiles<D, kTiles>;
  static constexpr int kLanes = Keys::kLanes;

  const SelectConfig& c;
  const Shared& shared;
  Keys keys;

  // Passes the pools of the `wanted` query blocks by. `rank`: of the unit among those of query block `lane` in this pass; `block`: whose
  // pools this lane holds, counted from the unit's first, `block0`. `kCareful`: scales are small.
  template <bool kCareful>
  HA_DEVICE void score(uint32_t wanted, int rank, int block0, int block, int lane) {
    const int8_t* const pools = shared.queries + lane / 4 * D;
    const Factors* const factors0 = shared.fine + lane % 4;
    const int fine = c.fine;
    while (wanted) {
      float own = 0.0f;
      int name = -1;  // query block whose score is this lane's own
      for (int n = 0; n < kLanes && wanted; ++n, wanted &= wanted - 1) {
        const int i = count_bits(~wanted & (wanted - 1));
        const int8_t* const pool = pools + i * (fine * D);
        const Factors* const factors = factors0 + i * (fine / 2);
        float best[kTiles][2];
        keys.template multiply_two<8>(pool, factors, lane, best);
        for (int part = 16; part < fine; part += 16) {  // more than 16 pools a query block
          float more[kTiles][2];
          keys.template multiply_two<8>(pool + part * D, factors + part / 2, lane, more);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) best[t][0] = fmaxf(best[t][0], more[t][0]), best[t][1] = fmaxf(best[t][1], more[t][1]);
        }
        float value = keys.template score<kCareful>(best, INT32_MAX);
        value = fmaxf(value, shuffle_xor(value, 1));
        value = fmaxf(value, shuffle_xor(value, 2));
        if (lane % kLanes == n) own = value, name = i;
      }
      own = fmaxf(own, -INFINITY);
      if (!kCareful) own = doubled_below_zero(own);
      const int place = shuffle(rank, max(name, 0)) << c.shift;
      // Other blocks of a kept superblock are no candidates, and stay below every score.
      if (name >= 0 && block < 1 << c.shift && block0 + block >= c.start && block0 + block < shared.blocks[name].stop)
        max_atomic(shared.area + name * c.row + c.carried + place + block, ordered(own));
    }
  }

  // From the first to behind the last unit of query block `lane` whose rank lies in this pass.
  struct Span {
    int start, stop;
  };
  HA_DEVICE Span span(int rank0, int lane) const {
    const SelectBlock block = lane < c.blocks ? shared.blocks[lane] : SelectBlock{};
    const int stop = min(rank0 + int(c.window), block.kept ? block.kept : block.units);
    if (rank0 >= stop) return {INT32_MAX / 2, 0};  // tickets are added to it
    if (!block.kept) return {rank0, stop};
    const uint16_t* const kept = shared.kept + lane * c.kept;
    return {kept[rank0], kept[stop - 1] + 1};
  }

  // Units of rank `rank0` to rank0 + window of each query block.
  HA_DEVICE void run(const PoolView& k, int per_block, int rank0, int lane) {
    const int parts = c.fine / 16;
    const Span own = span(rank0, lane);
    const int start = int(~warp_max(~uint32_t(own.start))), stop = int(warp_max(uint32_t(own.stop)));
    // Units differ in how many query blocks keep them: each warp takes the next one that is left, one ahead.
    const auto take = [&] { return start + int(warp_max(lane == 0 ? fetch_add_atomic(shared.next, 1) : 0)); };
    for (int unit = take(), next; unit < stop; unit = next) {
      next = take();
      const int word = (lane < c.blocks ? lane : 0) * int(c.words) + unit / 32, bit = unit % 32;
      const uint32_t mask = shared.masks[word];
      const int rank = (c.supers ? shared.before[word] : unit - bit) + count_bits(mask & ((1u << bit) - 1)) - rank0;
      const uint32_t wanted = ballot(lane < c.blocks && (mask >> bit & 1) && rank >= 0 && rank < c.window);
      if (!wanted) continue;
      const int block0 = (int(c.first_unit) + unit) << c.shift;
      for (int tile = lane / kLanes; tile < (parts << c.shift) + lane / kLanes; tile += kTiles) {
        const int block = parts == 1 ? tile : tile / parts, first = (block0 + block) * per_block;
        keys.load(k, first + (tile - block * parts) * 16, block < 1 << c.shift ? min(first + per_block, k.count) : 0, lane);
        if (ballot(keys.small())) score<true>(wanted, rank, block0, block, lane);
        else score<false>(wanted, rank, block0, block, lane);
      }
    }
  }
};

}  // namespace ha
