// How the kernels of selector `sortlsh` cut their work: pure functions of shape and attributes, tested without a GPU.
//
// Ranks of one digit are sorted by chunks: a block of threads sorts some neighbouring rows or keys once, and writes them to their
// places in the nodes of all levels whose segments are at least a chunk long. Shorter segments, and ranks of two digits, are
// sorted node by node.
#pragma once
#include "geometry.h"

namespace ha {

constexpr int kSortDigitBits = 8;
constexpr int kSortBins = 1 << kSortDigitBits;
constexpr int kMaxProjections = 16;

// --- ranks ----------------------------------------------------------------------------------------------------------

constexpr int kHashThreads = 128;
constexpr int kHashTileRows = 32;  // rows that a warp hashes at once
constexpr int kHashStages = 2;     // of a warp's ring, which these rows pass through

// Pieces of 16 bytes of each row that one stage holds: whole rows where they are short, because memory serves long runs faster.
HA_INLINE int hash_stage_pieces(int64_t pieces) { return pieces <= 8 ? 8 : 16; }
HA_INLINE constexpr int hash_blocks_per_processor(int stage_pieces) { return stage_pieces == 8 ? 5 : 3; }

// Bytes of shared memory: the rings, the signs of 8 or 16 projections in the layout of a row's pieces, the words of
// rule 26, counts, and what each projection's sum has to be above.
HA_INLINE size_t hash_shared(int64_t head_dim, int64_t pieces, int projections) {
  const int64_t stage = hash_stage_pieces(pieces), ring = kHashThreads * kHashStages * stage * 16;
  return size_t(ring + ceil_div(pieces, stage) * stage * projections * 16 + head_dim * 4 + (kSortBins + kMaxProjections) * 4);
}

// Floats that hash_centre's sums of the means take: kMaxProjections of every batch row and head of the queries, then of the keys.
HA_INLINE int64_t least_sums(const Geometry& g) { return g.a.hash_centre ? g.batch * (g.heads_q + g.heads_kv) * kMaxProjections : 0; }

// --- by chunks ------------------------------------------------------------------------------------------------------

constexpr int kChunkRows = 4096;      // at most
constexpr int kChunkQuarters = 4;     // each is one block's work when ranks are made and counted
constexpr int kQuarterRows = kChunkRows / kChunkQuarters;
constexpr int kChunkThreads = 512;
constexpr int kChunkWarps = kChunkThreads / 32;
constexpr int kChunkLaneRows = kChunkRows / kChunkThreads;
constexpr int kChunkScanThreads = 128;

// Bins of the counting sort: ranks have up to 7 or up to 8 bits.
HA_INLINE int chunk_bins(const HaAttributes& a) { return a.num_projections <= 7 ? 128 : 256; }

// The chunks of one side, cut in position: unit u, a segment of level `level`, holds chunks [u parts, (u + 1) parts).
struct SortChunks {
  int level;                  // the first whose segments are chunks or longer
  int64_t unit, parts, rows;  // positions of a unit, its chunks, positions of a chunk (a unit's last may have fewer)
  int64_t first, count;       // chunks that hold a position of the side

  HA_INLINE int64_t unit_of(int64_t chunk) const { return parts == 1 ? chunk : floor_div(chunk, parts); }
  HA_INLINE Range positions(int64_t chunk) const {
    const int64_t u = unit_of(chunk), start = u * unit + (chunk - u * parts) * rows;
    return {start, min64(start + rows, (u + 1) * unit)};
  }
  // The chunks of a segment of level `at`, counted from `first`, as far as there are any.
  HA_INLINE Range chunks_of(int64_t segment, int at) const {
    const int64_t size = parts << (at - level), low = segment * size - first;
    return {max64(low, 0), min64(low + size, count)};
  }
};

HA_INLINE SortChunks sort_chunks(const Geometry& g, int side) {
  SortChunks c{};
  c.unit = g.a.causal ? g.a.local_size : kChunkRows;
  for (; g.a.causal && c.unit * 2 <= kChunkRows; c.unit *= 2) ++c.level;
  c.parts = ceil_div(c.unit, kChunkRows);
  c.rows = ceil_div(c.unit, c.parts);
  const Range units = side == HA_QUERIES ? g.tiles(c.unit) : Range{0, ceil_div(g.seq_k, c.unit)};
  c.first = units.start * c.parts;
  c.count = units.size() * c.parts;
  return c;
}

// Whether some levels are sorted by chunks: those from the chunks' own on.
HA_INLINE bool sorts_chunks(const Geometry& g) {
  return g.a.num_projections <= kSortDigitBits && sort_chunks(g, HA_KEYS).level < g.levels();
}

// uint32 [batch, heads, quarters of chunks + 1, bins] of the queries, then of the keys, for chunks wherever the rows begin.
HA_INLINE int64_t chunk_counts(const Geometry& g) {
  if (!sorts_chunks(g)) return 0;
  const SortChunks c = sort_chunks(g, HA_KEYS);
  const auto rows = [&](int64_t most) { return (ceil_div(most, c.unit) + 1) * c.parts * kChunkQuarters + 1; };
  return g.batch * chunk_bins(g.a) * (g.heads_q * rows(g.seq_q) + g.heads_kv * rows(g.seq_k));
}

// --- node by node ---------------------------------------------------------------------------------------------------

constexpr int kSortMostThreads = 1024;

// Levels that are sorted node by node: the lowest ones.
HA_INLINE int node_levels(const Geometry& g) { return sorts_chunks(g) ? sort_chunks(g, HA_KEYS).level : g.levels(); }

// Pairs of segments of a level, a node's keys and its rows, that hold any key or row: their slots are one block's work.
HA_INLINE Range sort_spans(const Geometry& g, int level, int side) {
  if ((side == HA_QUERIES ? g.seq_q : g.seq_k) == 0) return {0, 0};
  if (!g.a.causal) return {0, 1};
  const int64_t size = 2 * g.segment(level);
  return side == HA_QUERIES ? g.tiles(size) : Range{0, ceil_div(g.seq_k, size)};
}

// Threads that sort one node: enough for the largest, the scan needs one a bin.
HA_INLINE int sort_threads(const Geometry& g) {
  int64_t most = max64(g.seq_q, g.seq_k);
  if (g.a.causal && node_levels(g)) most = min64(most, g.segment(node_levels(g) - 1));
  int threads = kSortBins;
  while (threads < kSortMostThreads && most > threads * 32) threads *= 2;
  return threads;
}

}  // namespace ha
