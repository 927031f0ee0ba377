// The selector `blocks` (rules 17 to 23): int8 products of quantised pools on the tensor cores, fused with the maximum, and
// the best key blocks of each query block. Scores live in shared memory only.
//
// A block of threads takes up to 32 neighbouring query blocks, so that key pools are read once for all of them: at either level
// a warp takes some key pools into registers and passes the query pools by that want them.
#include "best.cuh"
#include "launch.cuh"
#include "pool_products.cuh"

namespace ha {
namespace {

// What the threads of a block share, in shared memory. Units are named by what lies behind the first one of all.
struct Shared {
  int8_t* queries;     // fine query pools: [blocks * config.fine], each at shared_place
  uint32_t* area;      // scores: of superblocks [blocks / rounds, stride], then of key blocks [blocks, row]
  float* fine;         // factors of the query pools, NaN where there is none: [blocks, config.fine]
  float* coarse;       // [blocks * config.coarse]
  int32_t* kept;       // units: [blocks, config.kept]
  uint32_t* masks;     // kept units as bits: [blocks, words]
  int32_t* before;     // how many units are kept before those of a word: [blocks, words]
  int32_t* carried;    // best key blocks of earlier passes: [blocks, config.carried]
  SelectBlock* blocks;
  int* next;           // unit that no warp has taken yet

  HA_DEVICE Shared(const SelectConfig& c, int pool_bytes) {
    queries = reinterpret_cast<int8_t*>(shared_memory());
    coarse = reinterpret_cast<float*>(queries + c.blocks * c.fine * pool_bytes);
    fine = coarse + (c.blocks * c.coarse + 7) / 8 * 8;
    area = reinterpret_cast<uint32_t*>(fine + c.blocks * c.fine);
    kept = reinterpret_cast<int32_t*>(area + c.area);
    masks = reinterpret_cast<uint32_t*>(kept + c.blocks * c.kept);
    before = reinterpret_cast<int32_t*>(masks + c.blocks * c.words);
    carried = before + c.blocks * c.words;
    blocks = reinterpret_cast<SelectBlock*>(carried + c.blocks * c.carried);
    next = reinterpret_cast<int*>(blocks + c.blocks);
  }
};

HA_DEVICE SelectBlock find_block(const Geometry& g, const SelectConfig& c, int64_t block, int64_t length) {
  SelectBlock found{};
  const Range tiles = g.query_blocks();
  if (block < tiles.start || block >= tiles.stop) return found;
  const Range candidates = g.candidates(block * g.a.block_size, length);
  if (!candidates.size()) return found;
  found.stop = int(candidates.stop);
  found.units = int(ceil_div(candidates.stop, int64_t{1} << c.shift) - c.first_unit);
  if (!g.uses_superblocks(candidates)) return found;
  found.scored = found.units;
  found.kept = int(Geometry::kept_superblocks(found.units));
  found.pools = int(min64(candidates.stop * c.coarse, g.key_pools(kCoarsePool)));
  return found;
}

// Brings the fine query pools of one query block, from pool `first` on, on their way into shared memory.
template <int D>
HA_DEVICE void load_queries(int8_t* target, const PoolView& q, int first, int columns, int count, int lane) {
  constexpr int kPieces = D / 16;
  for (int i = lane; i < columns * kPieces; i += 32) {
    const int column = i / kPieces, piece = i % kPieces, pool = first + column;
    const bool inside = column < count && pool >= 0 && pool < q.count;
    copy_async(shared_address(target + shared_place<D>(column, piece)), q.values + int64_t(inside ? pool : 0) * D + piece * 16, inside);
  }
}

// Factors of `columns` query pools from `first` on, of which those below `count` are wanted.
HA_DEVICE void load_factors(float* target, const PoolView& q, int first, int columns, int count, int step, int index) {
  for (int i = index; i < columns; i += step) {
    const int pool = first + i;
    target[i] = i < count && pool >= 0 && pool < q.count ? load_once(q.scales + pool) : NAN;
  }
}

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
  HA_DEVICE void score(const PoolView& q, int first, int super, int shift, int lane) {
    const int columns = blocks << shift, pool0 = (int(c.first_unit) + super) * 16, at = super + lane / kLanes;
    // Of a query block with one coarse pool each column is a block of its own: the even ones first, then the odd ones.
    for (int odd = 0; odd < (shift ? 1 : 2); ++odd) {
      for (int column = 0; column < columns; column += 8) {
        Fragment<D> queries;
        queries.load(q, first + (block0 << shift) + column, lane);
        const int mine = column + lane % 4 * 2 + odd, i = mine >> shift;
        Factors factors = *reinterpret_cast<const Factors*>(shared.coarse + (block0 << shift) + column + lane % 4 * 2);
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

  HA_DEVICE void run(const PoolView& q, const PoolView& k, int first, int warp, int warps, int lane) {
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
      if (ballot(careful)) score<true>(q, first, super, shift, lane);
      else score<false>(q, first, super, shift, lane);
    }
  }
};

// Units of query block i that are scored: the best by their superblocks' `scores`, or all.
HA_DEVICE void keep_units(const SelectConfig& c, const Shared& shared, int i, const uint32_t* scores, int lane) {
  const SelectBlock& block = shared.blocks[i];
  uint32_t* const masks = shared.masks + i * c.words;
  int32_t *const before = shared.before + i * c.words, *const kept = shared.kept + i * c.kept;
  if (block.kept) {
    visit_best(scores, block.units, block.kept, lane, [&](int base, uint32_t taken, int rank) {
      if (lane == 0) masks[base / 32] = taken, before[base / 32] = rank;
      if (taken >> lane & 1) kept[rank + count_bits(taken & ((1u << lane) - 1))] = base + lane;
    });
  }
  for (int word = (block.kept ? (block.units + 31) / 32 : 0) + lane; word < c.words; word += 32) {
    const int left = block.kept ? 0 : block.units - word * 32;
    masks[word] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    before[word] = word * 32;
  }
}

// The key blocks of each unit for the query blocks that keep it.
template <int D>
struct UnitScores {
  static constexpr int kTiles = D <= 64 ? 4 : D <= 128 ? 2 : 1;  // of 16 key pools in registers
  static constexpr int kLanes = 32 / kTiles;                     // that hold the same tile's score in the end

  const SelectConfig& c;
  const Shared& shared;
  KeyTile<D> keys[kTiles];

  // Passes the pools of the `wanted` query blocks by; `rank`: of the unit among those of query block `lane` in this pass; `block0`: its
  // first key block, `mine`: the one behind it whose score this lane has in the end. `kCareful`: scales are small.
  template <bool kCareful>
  HA_DEVICE void score(uint32_t wanted, int rank, int block0, int mine, int lane) {
    // Other blocks of a kept superblock are no candidates, and stay below every score.
    const bool writes = lane % kLanes == 0 && mine < 1 << c.shift && block0 + mine >= c.start;
    for (; wanted; wanted &= wanted - 1) {
      const int i = count_bits(~wanted & (wanted - 1));
      float best[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) best[t] = -INFINITY;
      for (int column = 0; column < c.fine; column += 16) {
        Fragment<D> queries[2];
        Factors factors[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          load_shared(queries[n], shared.queries + (i * c.fine + column + n * 8) * D, lane);
          factors[n] = *reinterpret_cast<const Factors*>(shared.fine + i * c.fine + column + n * 8 + lane % 4 * 2);
        }
        float product[2][kTiles][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) multiply(keys, queries[n], factors[n], product[n]);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float most = fmaxf(product[0][t][half], product[1][t][half]);
            best[t] = fmaxf(best[t], mul_rn(kCareful ? doubled_below_zero(most) : most, keys[t].scale[half]));
          }
        }
      }
      float value = tile_maximum(best, lane);
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
      const int rank = shared.before[word] + count_bits(mask & ((1u << bit) - 1)) - rank0;
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

// Writes the best key blocks of query block i, or, where a pass is still to come, keeps them with their scores.
HA_DEVICE void take_best(const SelectConfig& c, const Shared& shared, int i, int rank0, int num_blocks, int32_t* out, int lane) {
  const SelectBlock& block = shared.blocks[i];
  const int carried = int(c.carried), ranks = max(0, min((block.kept ? block.kept : block.units) - rank0, int(c.window)));
  const int entries = carried + (ranks << c.shift);
  uint32_t* const scores = shared.area + i * c.row;
  int32_t* const names = shared.carried + i * carried;
  const int count = min(num_blocks, count_at_least(scores, entries, 1, lane));
  if (count) {
    visit_best(scores, entries, count, lane, [&](int base, uint32_t taken, int rank) {
      const bool take = taken >> lane & 1;
      const int e = base + lane, at = rank + count_bits(taken & ((1u << lane) - 1));
      int name = 0;
      if (take && e < carried) name = names[e];
      if (take && e >= carried) {
        const int own = rank0 + ((e - carried) >> c.shift), unit = block.kept ? shared.kept[i * c.kept + own] : own;
        name = ((int(c.first_unit) + unit) << c.shift) + ((e - carried) & ((1 << c.shift) - 1));
      }
      if (out) {
        if (take) out[at] = name;
      } else {
        const uint32_t score = take ? scores[e] : 0;
        sync_warp();  // what is written lies below base + 32
        if (take) names[at] = name, scores[at] = score;
        sync_warp();
      }
    });
  }
  if (out) {
    for (int e = count + lane; e < num_blocks; e += 32) out[e] = -1;
  } else {
    sync_warp();
    for (int e = count + lane; e < c.row; e += 32) scores[e] = 0;
  }
}

template <int D>
HA_KERNEL(kSelectThreads, 1) select_kernel(const HA_CONSTANT SelectArgs args) {
  const Geometry g(args.p);
  const SelectConfig& c = args.config;
  const int warp = thread_index() / 32, warps = c.threads / 32, lane = thread_index() % 32;
  // The last group has the most candidates: first.
  const int64_t block0 = (c.first + c.groups - 1 - block_index() % c.groups) * c.blocks;
  const int64_t slice = block_index() / c.groups, batch = slice / g.heads_q;
  const int64_t kv_slice = batch * g.heads_kv + slice % g.heads_q / g.group();
  const int per_block = g.a.block_size / g.a.pool_size;
  const PoolView q(args.q_fine, slice), k(args.k_fine, kv_slice), q_coarse(args.q_coarse, slice), k_coarse(args.k_coarse, kv_slice);
  const int first = int(block0 * per_block - floor_div(g.first(), g.a.pool_size));
  const int first_coarse = int(block0 * c.coarse - floor_div(g.first(), kCoarsePool));

  const Shared shared(c, D);
  const auto clear = [&](int64_t words) {
    for (int i = thread_index(); i < words; i += c.threads) shared.area[i] = 0;
    if (thread_index() == 0) *shared.next = 0;
  };
  if (thread_index() < c.blocks) shared.blocks[thread_index()] = find_block(g, c, block0 + thread_index(), g.length(args.p.lengths, batch));
  for (int i = warp; i < c.blocks; i += warps) {
    load_queries<D>(shared.queries + i * c.fine * D, q, first + i * per_block, c.fine, per_block, lane);
    load_factors(shared.fine + i * c.fine, q, first + i * per_block, c.fine, per_block, 32, lane);
  }
  copy_commit();
  const int columns = c.blocks * c.coarse;
  load_factors(shared.coarse, q_coarse, first_coarse, (columns + 7) / 8 * 8, columns, c.threads, thread_index());

  const int round = c.blocks / c.rounds;
  for (int i0 = 0; i0 < c.blocks; i0 += round) {
    if (c.supers) {
      clear(round * c.stride);
      sync_block();
      SuperScores<D>{c, shared, i0, round, {}}.run(q_coarse, k_coarse, first_coarse, warp, warps, lane);
    }
    sync_block();
    for (int i = warp; i < round; i += warps) keep_units(c, shared, i0 + i, shared.area + i * c.stride, lane);
    sync_block();
  }

  clear(c.blocks * c.row);
  copy_wait<0>();
  const Range tiles = g.query_blocks();
  for (int pass = 0; pass < c.passes; ++pass) {
    const int rank0 = pass * int(c.window);
    sync_block();
    UnitScores<D>{c, shared, {}}.run(k, per_block, rank0, lane);
    sync_block();
    for (int i = warp; i < c.blocks; i += warps) {
      if (block0 + i < tiles.start || block0 + i >= tiles.stop) continue;
      int32_t* const out = args.plan + (slice * tiles.size() + block0 + i - tiles.start) * g.a.num_blocks;
      take_best(c, shared, i, rank0, g.a.num_blocks, pass + 1 < c.passes ? nullptr : out, lane);
    }
    if (thread_index() == 0) *shared.next = 0;
  }
}

template <int D>
void launch_instance(const SelectArgs& args) {
  const Geometry g(args.p);
  launch<select_kernel<D>>(g.batch * g.heads_q * args.config.groups, args.config.threads, size_t(args.config.bytes), args.p.stream, args);
}

}  // namespace

void launch_select(const SelectArgs& args) {
#define HA_CASE(D) \
  if (args.q_fine.stride == D) return launch_instance<D>(args);
  HA_POOL_STRIDES(HA_CASE)
#undef HA_CASE
}

}  // namespace ha
