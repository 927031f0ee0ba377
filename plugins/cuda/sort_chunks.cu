// The sorted rows and keys of `sortlsh` (rules 24 to 28) where ranks have one digit and segments are long: a stable counting sort of
// all levels at once. A place in a sorted segment is the number of its members of lower rank, and of the same rank in earlier chunks
// and earlier in the same chunk. So the first kernel counts every chunk's ranks, the second adds the counts up along the chunks,
// and the third sorts each chunk in shared memory and copies it, run by run of equal ranks, to its places in each level.
#include "kernels.h"
#include "launch.cuh"
#include "sort.cuh"

namespace ha {
namespace {

constexpr uint32_t kNoRank = 0xFFFF;
constexpr int kScanBatch = 16;  // counts that a thread fetches at once

struct ChunkArgs {
  SortArgs sort;
  SortChunks q, k;
};

// One block's work.
struct Chunk {
  bool queries;
  int64_t slice;       // batch and head
  int64_t length;      // valid keys of the batch row
  int64_t unit;        // that it lies in
  int64_t number;      // from the side's first chunk
  int64_t rows;        // of the side
  Range slots;         // its rows or keys
  Range members;       // those that are sorted: live rows; keys behind the sinks and inside the length
};

HA_DEVICE Chunk find_chunk(const ChunkArgs& args, const Geometry& g) {
  Chunk c{};
  const int64_t blocks_q = g.batch * g.heads_q * args.q.count;
  c.queries = block_index() < blocks_q;
  const SortChunks& chunks = c.queries ? args.q : args.k;
  const uint32_t at = uint32_t(c.queries ? block_index() : block_index() - blocks_q), count = uint32_t(chunks.count);
  c.slice = at / count;
  c.number = at % count;
  c.unit = chunks.unit_of(chunks.first + c.number);
  c.length = g.length(args.sort.p.lengths, uint32_t(c.slice) / uint32_t(c.queries ? g.heads_q : g.heads_kv));
  c.rows = c.queries ? g.seq_q : g.seq_k;
  const int64_t first = c.queries ? g.first() : 0;
  const Range at_positions = chunks.positions(chunks.first + c.number);
  c.slots = {max64(at_positions.start - first, 0), min64(at_positions.stop - first, c.rows)};
  const Range sorted = c.queries ? Range{0, g.live_rows(c.length)} : Range{min64(g.a.sinks, c.length), c.length};
  c.members.start = min64(max64(c.slots.start, sorted.start), c.slots.stop);
  c.members.stop = max64(min64(c.slots.stop, sorted.stop), c.members.start);
  return c;
}

// Counts of a slice: [chunks + 1, kBins].
template <int kBins>
HA_DEVICE uint32_t* slice_counts(const ChunkArgs& args, const Geometry& g, bool queries, int64_t slice) {
  const int64_t rows_q = args.q.count + 1, rows_k = args.k.count + 1;
  return args.sort.counts + (queries ? slice * rows_q : g.batch * g.heads_q * rows_q + slice * rows_k) * kBins;
}

// Counts the ranks of a warp's part of a chunk in `mine`. `held` gets the rank of each of a lane's members and, above it, how many
// members of that rank the warp has before it; kNoRank behind the last member.
template <int kBins>
HA_DEVICE void count_part(const ChunkArgs& args, const Chunk& chunk, uint32_t* mine, uint32_t (&held)[kChunkLaneRows]) {
  const int lane = thread_index() % 32, start = thread_index() / 32 * 32 * kChunkLaneRows, size = int(chunk.members.size());
  const uint16_t* const ranks = (chunk.queries ? args.sort.ranks_q : args.sort.ranks_k) + chunk.slice * chunk.rows + chunk.members.start;
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) {
    const int at = start + i * 32 + lane;
    held[i] = at < size ? load_once(ranks + at) : kNoRank;
  }
  for (int bin = lane; bin < kBins; bin += 32) mine[bin] = 0;
  sync_warp();
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) {
    if (start + i * 32 >= size) break;
    const bool valid = held[i] != kNoRank;
    const uint32_t rank = valid ? held[i] : 0, peers = same_digit<kBins>(int(rank), valid);
    const uint32_t before = mine[rank], own = count_bits(peers & ((1u << lane) - 1));
    sync_warp();
    if (valid) {
      held[i] |= (before + own) << 16;
      if (own == 0) mine[rank] = before + count_bits(peers);
    }
    sync_warp();
  }
}

template <int kBins>
HA_KERNEL(kChunkThreads, 4) sort_count_kernel(const HA_CONSTANT ChunkArgs args) {
  const Geometry g(args.sort.p);
  const Chunk chunk = find_chunk(args, g);
  uint32_t* const counts = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t held[kChunkLaneRows];
  count_part<kBins>(args, chunk, counts + thread_index() / 32 * kBins, held);
  sync_block();
  uint32_t* const out = slice_counts<kBins>(args, g, chunk.queries, chunk.slice) + chunk.number * kBins;
  for (int bin = thread_index(); bin < kBins; bin += kChunkThreads) {
    uint32_t total = 0;
#pragma unroll
    for (int warp = 0; warp < kChunkWarps; ++warp) total += counts[warp * kBins + bin];
    out[bin] = total;
  }
}

// Each chunk's counts become the sums over the chunks before it; behind the last come the totals.
template <int kBins>
HA_KERNEL(kChunkScanThreads, 4) sort_scan_kernel(const HA_CONSTANT ChunkArgs args) {
  const Geometry g(args.sort.p);
  constexpr int kBlocks = kBins / kChunkScanThreads;
  const int64_t slices_q = g.batch * g.heads_q, slice = block_index() / kBlocks;
  const bool queries = slice < slices_q;
  const int count = int(queries ? args.q.count : args.k.count);
  uint32_t* const column = slice_counts<kBins>(args, g, queries, queries ? slice : slice - slices_q) +
                           block_index() % kBlocks * kChunkScanThreads + thread_index();
  uint32_t sum = 0;
  for (int first = 0; first <= count; first += kScanBatch) {
    uint32_t counts[kScanBatch];
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) counts[i] = first + i < count ? column[(first + i) * kBins] : 0;
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      if (first + i <= count) column[(first + i) * kBins] = sum;
      sum += counts[i];
    }
  }
}

// What a level's slots of a chunk get: [start, sorted) the node's sorted members, [sorted, stop) dead rows, the others -1.
struct Bounds {
  int start, sorted, stop;
};

// The node at a level that has the chunk's rows (keys) as such.
HA_DEVICE Bounds node_bounds(const SortChunks& chunks, const Geometry& g, const Chunk& chunk, int level, Range* segment) {
  *segment = {0, chunks.count};
  int64_t m = 0;
  if (g.a.causal) {
    const int64_t s = chunk.unit >> (level - chunks.level);
    *segment = chunks.chunks_of(s, level);
    // With overlap, the keys of level 0 are the rows' local part.
    if (s < 0 || (s & 1) != chunk.queries || (level == 0 && g.a.local_overlap)) return {0, 0, 0};
    m = s >> 1;
  }
  const Node node = g.node(level, m, chunk.length);
  if (node.empty()) return {0, 0, 0};
  const Range range = chunk.queries ? node.rows : node.keys;
  return {int(range.start), int(chunk.queries ? range.start + node.live : range.stop), int(range.stop)};
}

// Where the chunk's members of each rank begin: kBins places, less their place among the chunk's own sorted members, so that a member's
// own place is a sum of the two. A lane has kBins / 32 neighbouring ranks.
template <int kBins>
HA_DEVICE void write_places(const uint32_t* counts, const Range& segment, int64_t number, uint32_t start, uint32_t* places, uint32_t* own) {
  constexpr int kRanks = kBins / 32;
  const int lane = thread_index() % 32;
  uint32_t total[kRanks], before[kRanks], mine[kRanks], sum_total = 0, sum_mine = 0;
#pragma unroll
  for (int i = 0; i < kRanks; i += 4) {
    const uint32_t* const column = counts + lane * kRanks + i;
    const Words4 from = load16(column + segment.start * kBins), to = load16(column + segment.stop * kBins);
    const Words4 here = load16(column + number * kBins), next = load16(column + (number + 1) * kBins);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      total[i + j] = to.w[j] - from.w[j];
      before[i + j] = here.w[j] - from.w[j];
      mine[i + j] = next.w[j] - here.w[j];
      sum_total += total[i + j];
      sum_mine += mine[i + j];
    }
  }
  start += sum_below(sum_total, lane);
  uint32_t own_start = sum_below(sum_mine, lane);
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    if (places) places[lane * kRanks + i] = start + before[i] - own_start;
    if (own) own[lane * kRanks + i] = own_start;
    start += total[i];
    own_start += mine[i];
  }
}

template <int kBins>
HA_KERNEL(kChunkThreads, 4) sort_chunk_kernel(const HA_CONSTANT ChunkArgs args) {
  const Geometry g(args.sort.p);
  const Chunk chunk = find_chunk(args, g);
  const SortChunks& chunks = chunk.queries ? args.q : args.k;
  const int warp = thread_index() / 32, lane = thread_index() % 32, size = int(chunk.members.size());
  const int levels = g.levels() - chunks.level;  // that this kernel writes
  uint32_t* const order = reinterpret_cast<uint32_t*>(shared_memory());  // rank << 16 | place in the chunk, sorted
  uint32_t* const starts = order + kChunkRows;                           // [warps, kBins]
  uint32_t* const own = starts + kChunkWarps * kBins;
  uint32_t* const places = own + kBins;                                  // [levels, kBins]
  Bounds* const bounds = reinterpret_cast<Bounds*>(places + levels * kBins);

  uint32_t held[kChunkLaneRows];
  count_part<kBins>(args, chunk, starts + warp * kBins, held);
  const uint32_t* const counts = slice_counts<kBins>(args, g, chunk.queries, chunk.slice);
  for (int i = warp; i < levels; i += kChunkWarps) {
    Range segment;
    const Bounds mine = node_bounds(chunks, g, chunk, chunks.level + i, &segment);
    write_places<kBins>(counts, segment, chunk.number, uint32_t(mine.start), places + i * kBins, i == 0 ? own : nullptr);
    if (lane == 0) bounds[i] = mine;
  }
  sync_block();

  int32_t* const out = args.sort.plan + (chunk.queries ? 0 : g.batch * g.heads_q * g.levels() * g.seq_q) +
                       (chunk.slice * g.levels() + chunks.level) * chunk.rows;
  for (int i = 0; i < levels; ++i) {
    const Bounds b = bounds[i];
    if (b.start <= chunk.slots.start && chunk.slots.stop <= b.sorted) continue;
    for (int slot = int(chunk.slots.start) + thread_index(); slot < chunk.slots.stop; slot += kChunkThreads)
      if (slot < b.start || slot >= b.sorted) out[i * chunk.rows + slot] = slot >= b.sorted && slot < b.stop ? slot : -1;
  }
  for (int bin = thread_index(); bin < kBins; bin += kChunkThreads) {
    uint32_t start = own[bin];
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) {
      const uint32_t count = starts[w * kBins + bin];
      starts[w * kBins + bin] = start;
      start += count;
    }
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) {
    const int at = (warp * kChunkLaneRows + i) * 32 + lane;
    const uint32_t rank = held[i] & 0xFFFFu;
    if (at < size) order[starts[warp * kBins + rank] + (held[i] >> 16)] = rank << 16 | uint32_t(at);
  }
  sync_block();
  uint32_t mine[kChunkLaneRows];
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) {
    const int at = i * kChunkThreads + thread_index();
    mine[i] = at < size ? order[at] : 0;
  }
  for (int level = 0; level < levels; ++level) {
    if (bounds[level].start == bounds[level].sorted) continue;
    int32_t* const slots = out + level * chunk.rows + thread_index();
#pragma unroll
    for (int i = 0; i < kChunkLaneRows; ++i)
      if (i * kChunkThreads + thread_index() < size)
        slots[int(places[level * kBins + (mine[i] >> 16)]) + i * kChunkThreads] = int(chunk.members.start) + int(mine[i] & 0xFFFFu);
  }
}

template <int kBins>
void launch_bins(const ChunkArgs& args, const Geometry& g) {
  const int64_t blocks = g.batch * (g.heads_q * args.q.count + g.heads_kv * args.k.count);
  const int levels = g.levels() - args.k.level;
  void* const stream = args.sort.p.stream;
  launch<sort_count_kernel<kBins>>(blocks, kChunkThreads, size_t{4} * kChunkWarps * kBins, stream, args);
  launch<sort_scan_kernel<kBins>>(g.batch * (g.heads_q + g.heads_kv) * (kBins / kChunkScanThreads), kChunkScanThreads, 0, stream, args);
  const size_t words = kChunkRows + size_t(kChunkWarps + 1 + levels) * kBins;
  launch<sort_chunk_kernel<kBins>>(blocks, kChunkThreads, words * 4 + size_t(levels) * sizeof(Bounds), stream, args);
}

}  // namespace

void launch_sort_chunks(const SortArgs& sort) {
  const Geometry g(sort.p);
  const ChunkArgs args{sort, sort_chunks(g, HA_QUERIES), sort_chunks(g, HA_KEYS)};
  if (args.k.level >= g.levels()) return;
  if (chunk_bins(g.a) == 128) launch_bins<128>(args, g);
  else launch_bins<256>(args, g);
}

}  // namespace ha
