// What the threads of a block share while they select, and what goes into it first.
#pragma once
#include "pool_products.cuh"

namespace ha {

// What the threads of a block share, in shared memory. Query pools and scores of the second level lie where those of the first were. Units
// are named by what lies behind the first one of all.
struct Shared {
  // First level, of a round:
  int8_t* queries_coarse;  // query pools: [columns], pieces at shared_piece
  Factors* coarse;         // of these, NaN where there is none: [columns / 2]
  uint32_t* supers;        // scores of superblocks: [blocks / rounds, stride]
  // Second level, in the same place:
  int8_t* queries;         // fine query pools: [blocks * config.fine]
  Factors* fine;           // [blocks, config.fine / 2]
  uint32_t* area;          // scores of key blocks: [blocks, row]
  // Both:
  uint32_t* masks;         // kept units as bits: [blocks, words]
  int32_t* carried;        // best key blocks of earlier passes: [blocks, config.carried]
  SelectBlock* blocks;
  int* next;               // unit that no warp has taken yet
  uint16_t* kept;          // units that the first level keeps: [blocks, config.kept]; fewer than 2^16 superblocks have room in `supers`
  uint16_t* before;        // how many it keeps before those of a word: [blocks, words]

  HA_DEVICE Shared(const SelectConfig& c, int pool_bytes) {
    queries = queries_coarse = reinterpret_cast<int8_t*>(shared_memory());
    coarse = reinterpret_cast<Factors*>(queries_coarse + c.columns * pool_bytes);
    supers = reinterpret_cast<uint32_t*>(coarse + c.columns / 2);
    fine = reinterpret_cast<Factors*>(queries + c.blocks * c.fine * pool_bytes);
    area = reinterpret_cast<uint32_t*>(fine + c.blocks * c.fine / 2);
    masks = reinterpret_cast<uint32_t*>(shared_memory() + c.level);
    carried = reinterpret_cast<int32_t*>(masks + c.blocks * c.words);
    blocks = reinterpret_cast<SelectBlock*>(carried + c.blocks * c.carried);
    next = reinterpret_cast<int*>(blocks + c.blocks);
    kept = reinterpret_cast<uint16_t*>(next + 1);
    before = kept + c.blocks * c.kept;
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

// Sends query pools into the `columns` places from `target` on in shared memory, and writes their factors: pool_of(column) says which
// one, or -1 for none. Threads `index` of `step` do it together.
template <int D, class PoolOf>
HA_DEVICE void load_queries(int8_t* target, Factors* factors, const PoolView& q, int columns, int step, int index, PoolOf pool_of) {
  constexpr int kPieces = D / 16;
  for (int i = index; i < columns * kPieces; i += step) {
    const int column = i / kPieces, piece = i % kPieces, pool = pool_of(column);
    const bool inside = pool >= 0 && pool < q.count;
    const int8_t* const source = q.values + int64_t(inside ? pool : 0) * D + piece * 16;
    copy_async(shared_address(target + column * D + shared_piece<D>(column, piece)), source, inside);
    if (piece == 0) set_factor(factors, column, inside ? load_once(q.scales + pool) : NAN);
  }
}

}  // namespace ha
