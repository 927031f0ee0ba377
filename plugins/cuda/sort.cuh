// What the hash and the sorts of `sortlsh` share: ranks in memory, chunks, and a warp's view of digits and counts.
#pragma once
#include "device.cuh"
#include "sort_config.h"

namespace ha {

// Lanes with the same digit below kBins, among those where `valid`.
template <int kBins>
HA_DEVICE uint32_t same_digit(uint32_t digit, bool valid) {
  uint32_t peers = ballot(valid);
#pragma unroll
  for (int bit = 1; bit < kBins; bit *= 2) peers &= lanes_alike(digit, bit);
  return peers;
}

// A rank of one digit stands in memory with what its tile of kHashTileRows rows says of it: how many members of the tile before it have
// the same rank, and whether it is the last of them. Ranks of two digits stand alone.
struct RankWord {
  uint32_t bits;
  HA_DEVICE uint32_t rank() const { return bits & (kSortBins - 1); }
  HA_DEVICE uint32_t before() const { return bits >> kSortDigitBits & (kHashTileRows - 1); }
  HA_DEVICE bool last() const { return bits >> 15; }
};
HA_DEVICE uint16_t rank_word(uint32_t rank, uint32_t before, bool last) {
  return uint16_t(rank | before << kSortDigitBits | uint32_t(last) << 15);
}

// A chunk's rows or keys, and which of them are sorted. Its tiles are cut from the first slot on.
struct Chunk {
  bool queries;
  int64_t slice;   // batch and head
  int64_t length;  // valid keys of the batch row
  int64_t unit;    // that it lies in
  int64_t number;  // from the side's first chunk
  int64_t rows;    // of the side
  Range slots;
  Range members;   // live rows; keys behind the sinks and inside the length
};

HA_DEVICE Chunk find_chunk(const HaParams& p, const Geometry& g, const SortChunks& chunks_q, const SortChunks& chunks_k, int64_t at) {
  Chunk c{};
  const int64_t count_q = g.batch * g.heads_q * chunks_q.count;
  c.queries = at < count_q;
  const SortChunks& chunks = c.queries ? chunks_q : chunks_k;
  const uint32_t within = uint32_t(c.queries ? at : at - count_q), count = uint32_t(chunks.count);
  c.slice = within / count;
  c.number = within % count;
  c.unit = chunks.unit_of(chunks.first + c.number);
  c.length = g.length(p.lengths, uint32_t(c.slice) / uint32_t(c.queries ? g.heads_q : g.heads_kv));
  c.rows = c.queries ? g.seq_q : g.seq_k;
  const int64_t first = c.queries ? g.first() : 0;
  const Range positions = chunks.positions(chunks.first + c.number);
  c.slots = {max64(positions.start - first, 0), min64(positions.stop - first, c.rows)};
  const Range sorted = c.queries ? Range{0, g.live_rows(c.length)} : Range{min64(g.a.sinks, c.length), c.length};
  c.members.start = min64(max64(c.slots.start, sorted.start), c.slots.stop);
  c.members.stop = max64(min64(c.slots.stop, sorted.stop), c.members.start);
  return c;
}

// Counts of one slice: [quarters + 1, bins].
HA_DEVICE uint32_t* slice_counts(uint32_t* counts, const Geometry& g, const SortChunks& chunks_q, const SortChunks& chunks_k, bool queries,
                                 int64_t slice, int bins) {
  const int64_t rows_q = chunks_q.count * kChunkQuarters + 1, rows_k = chunks_k.count * kChunkQuarters + 1;
  return counts + (queries ? slice * rows_q : g.batch * g.heads_q * rows_q + slice * rows_k) * bins;
}

// Sum of the lower lanes' counts.
HA_DEVICE uint32_t sum_below(uint32_t count, int lane) {
  uint32_t start = 0;
  // After each step, `count` is the sum over the lane's aligned group and `start` the sum of those before it.
  for (int mask = 1; mask < 32; mask *= 2) {
    const uint32_t other = uint32_t(shuffle_xor(int(count), mask));
    if (lane & mask) start += other;
    count += other;
  }
  return start;
}

}  // namespace ha
