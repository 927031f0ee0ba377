// How the kernels of selector `blocks` cut their work: pure functions of shape, attributes and the GPU's shared memory, tested
// without a GPU.
#pragma once
#include "slice_order.h"

namespace ha {

// Bytes from one quantised pool to the next, X(bytes): the head size filled up to whole tensor-core operands.
#define HA_POOL_STRIDES(X) X(64) X(128) X(192) X(256)
HA_INLINE int64_t pool_stride(int64_t head_dim) { return ceil_div(head_dim, 64) * 64; }

constexpr int kSelectLeastThreads = 96;
// At most, so that all operands of longer pools stay in registers.
HA_INLINE constexpr int select_threads(int64_t stride) { return stride <= 64 ? 512 : 384; }
constexpr int kSelectMostBlocks = 32;          // query blocks of one block of threads: a lane knows one
constexpr int kSelectTile = 16;                // fine query pools are filled up to whole tensor-core operands
constexpr int kSelectRounds = 4;               // parts of either level at most
constexpr int64_t kSelectWaves = 512;          // blocks of threads that keep a large GPU busy
constexpr int kSelectShared = 96 * 1024;       // every GPU of sm_80 and later grants this
constexpr int kSelectMostShared = 227 * 1024;  // taken at most: sm_90 grants this

// What is known of one query block. A unit is a superblock, or a key block where rule 23 does not apply.
struct SelectBlock {
  int stop;    // end of the candidate key blocks
  int units;   // that hold them, counted from the first unit of all
  int scored;  // by coarse pools: all, or none where all are kept
  int kept;    // by these scores; 0 = all
  int pools;   // coarse key pools that take part
};

struct SelectConfig {
  int blocks, threads;        // neighbouring query blocks of one block of threads
  int64_t first, groups;      // groups of `blocks` query blocks, cut at multiples, that hold a row
  SliceOrder order;           // of groups, the last one of a slice first: it has the most candidates
  int shift;                  // key blocks a unit = 1 << shift
  int64_t start, first_unit;  // first candidate key block of every query block, and the unit that holds it
  int fine, coarse;           // query pools of a query block, fine ones with what fills them up; coarse ones a power of two, 0 if unused
  int spread;                 // columns of its coarse ones, which are repeated up to four
  int64_t supers, kept;       // most superblocks scored and kept for one query block; 0 = all units are scored
  int rounds, passes;         // the first level takes blocks / rounds query blocks at a time, the second `window` kept units of each
  int64_t columns;            // coarse query pools of a round, with what fills up the last four query blocks
  int64_t stride, window;     // words from one query block's superblocks to the next: odd, so that lanes meet different banks
  int64_t words, carried;     // words of 32 units; best blocks that are carried from one pass to the next
  int64_t row;                // scores of key blocks of one query block
  int64_t level, bytes;       // for the query pools and scores of either level, which take each other's place; in all
  bool fits() const { return bytes <= kSelectMostShared; }
};

// `shared`: bytes of shared memory that the GPU grants a block of threads.
inline SelectConfig select_config(const Geometry& g, int64_t shared = kSelectShared) {
  SelectConfig c{};
  const Range tiles = g.query_blocks();
  // Candidates grow with the position and with the length, so the last query block of a full row has the most.
  const Range most = g.candidates((tiles.stop - 1) * g.a.block_size, g.seq_k);
  int64_t units = most.size();
  c.start = c.first_unit = most.start;
  c.fine = int(ceil_div(g.a.block_size / g.a.pool_size, kSelectTile)) * kSelectTile;
  if (g.may_use_superblocks()) {
    while (g.a.block_size << c.shift < kSuperblock) ++c.shift;
    c.first_unit = most.start >> c.shift;
    units = units ? g.superblocks(most).size() : 0;
    c.supers = units > kKeptMin ? units : 0;
    c.kept = c.supers ? Geometry::kept_superblocks(units) : 0;
  }
  if (c.supers) c.stride = c.supers | 1, c.coarse = g.a.block_size / kCoarsePool, c.spread = c.coarse < 4 ? 4 : c.coarse;
  c.words = ceil_div(units, 32) | 1;
  // Query blocks with fewer candidates score all of them, at most kKeptMin superblocks.
  const int64_t ranks = c.supers ? c.kept : units;
  int64_t first = 0, second = 0;  // bytes of either level
  const auto measure = [&](int64_t limit) {
    c.window = ceil_div(ranks, c.passes);
    c.carried = c.passes > 1 ? g.a.num_blocks : 0;
    c.row = c.carried + (c.window << c.shift);
    c.columns = ceil_div(c.blocks / c.rounds, 4) * 4 * c.spread;
    const int64_t pool = pool_stride(g.head_dim) + 8;
    first = c.columns * pool + c.blocks / c.rounds * c.stride * 4;
    second = c.blocks * (c.fine * pool + c.row * 4);
    c.level = max64(first, second);
    const int64_t block = (c.words + c.carried) * 4 + (c.supers ? c.kept + c.words : 0) * 2 + int64_t{sizeof(SelectBlock)};
    c.bytes = c.level + c.blocks * block + 4;
    return c.bytes <= limit;
  };
  // Fewer query blocks at a time for each level before fewer in all, which would read key pools more often.
  const auto fit = [&](int64_t limit) {
    for (c.rounds = c.passes = 1; !measure(limit);) {
      const bool first_level = first > second;
      if (first_level && c.blocks / c.rounds >= 8 && c.rounds < kSelectRounds) c.rounds *= 2;
      else if (!first_level && c.passes < kSelectRounds) c.passes *= 2;
      else return false;
    }
    return true;
  };
  const auto groups = [&] { return tiles.size() ? floor_div(tiles.stop - 1, c.blocks) - floor_div(tiles.start, c.blocks) + 1 : 0; };
  c.blocks = kSelectMostBlocks;
  while (c.blocks > 4 && groups() * g.batch * g.heads_q < kSelectWaves) c.blocks /= 2;
  while (!fit(shared) && c.blocks > 1) c.blocks /= 2;
  // As many threads as keep a multiprocessor busy with the blocks that its shared memory holds.
  const int threads = c.threads = select_threads(pool_stride(g.head_dim));
  const auto more = [&] { return (threads / c.threads + 1) * c.bytes <= shared; };  // another block of threads fits beside
  while (c.threads / 2 >= kSelectLeastThreads && c.threads > c.blocks * 16 && more()) c.threads /= 2;
  // Two blocks of half the threads beside each other, one of which scores while the other searches, where that takes no more passes.
  if (c.threads == threads && c.blocks == kSelectMostBlocks) {
    const SelectConfig alone = c;
    if (fit((shared - 1024) / 2) && c.passes == alone.passes) c.threads /= 2;
    else c = alone;
  }
  c.first = floor_div(tiles.start, c.blocks);
  c.groups = groups();
  c.order = slice_order(g, c.groups, (g.key_pools(g.a.pool_size) + (c.supers ? g.key_pools(kCoarsePool) : 0)) * pool_stride(g.head_dim));
  return c;
}

}  // namespace ha
