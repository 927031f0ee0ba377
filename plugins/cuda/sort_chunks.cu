// The sorted rows and keys of `sortlsh` (rules 24 to 28) where ranks have one digit and segments are long: a stable counting sort of
// all levels at once. A place in a sorted segment is the number of its members of lower rank, and of the same rank in earlier chunks
// and earlier in the same chunk. The hash has counted the ranks of every quarter of a chunk; the first kernel adds the counts up
// along the side, and the second sorts each chunk in shared memory and copies it, run by run of equal ranks, to its places in each level.
#include "kernels.h"
#include "launch.cuh"
#include "sort.cuh"

namespace ha {
namespace {

constexpr int kScanBatch = 64;  // counts that a thread fetches at once
constexpr int kWarpRows = kChunkRows / kChunkWarps;
static_assert(kScanBatch % kChunkQuarters == 0 && kWarpRows % kHashTileRows == 0 && kHashTileRows == 32);

struct ChunkArgs {
  SortArgs sort;
  SortChunks q, k;
};

// The first quarter's counts of each chunk become the sums over the chunks before it; behind the last come the totals.
template <int kBins>
HA_KERNEL(kChunkScanThreads, 4) sort_scan_kernel(const HA_CONSTANT ChunkArgs args) {
  const Geometry g(args.sort.p);
  constexpr int kBlocks = kBins / kChunkScanThreads;
  const int64_t slices_q = g.batch * g.heads_q, at = block_index() / kBlocks;
  const bool queries = at < slices_q;
  const int count = int(queries ? args.q.count : args.k.count) * kChunkQuarters;
  uint32_t* const column = slice_counts(args.sort.counts, g, args.q, args.k, queries, queries ? at : at - slices_q, kBins) +
                           block_index() % kBlocks * kChunkScanThreads + thread_index();
  uint32_t sum = 0;
  for (int first = 0; first <= count; first += kScanBatch) {
    uint32_t counts[kScanBatch];
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) counts[i] = first + i < count ? column[(first + i) * kBins] : 0;
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      if (i % kChunkQuarters == 0 && first + i <= count) column[(first + i) * kBins] = sum;
      sum += counts[i];
    }
  }
}

// Counts the ranks of a warp's part of a chunk in `mine`. `held`, the words of a lane's slots (0 for none), become rank << 16 | how many
// members of that rank the part has before.
HA_DEVICE void rank_part(uint32_t* mine, uint32_t (&held)[kChunkLaneRows]) {
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) {
    const RankWord word{held[i]};
    const uint32_t count = mine[word.rank()] + word.before();
    sync_warp();
    if (word.last()) mine[word.rank()] = count + 1;
    sync_warp();
    held[i] = word.rank() << 16 | count;
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
    const auto before_chunk = [&](int64_t chunk) { return load16(column + chunk * kChunkQuarters * kBins); };
    const Words4 from = before_chunk(segment.start), to = before_chunk(segment.stop);
    const Words4 here = before_chunk(number), next = before_chunk(number + 1);
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
HA_KERNEL(kChunkThreads, 2) sort_chunk_kernel(const HA_CONSTANT ChunkArgs args) {
  const Geometry g(args.sort.p);
  const Chunk chunk = find_chunk(args.sort.p, g, args.q, args.k, block_index());
  const SortChunks& chunks = chunk.queries ? args.q : args.k;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int levels = g.levels() - chunks.level;  // that this kernel writes
  uint32_t* const order = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* const starts = order + kChunkRows;  // [warps, kBins]
  uint32_t* const own = starts + kChunkWarps * kBins;
  uint32_t* const places = own + kBins;  // [levels, kBins]
  Bounds* const bounds = reinterpret_cast<Bounds*>(places + levels * kBins);

  // From here on a slot is counted from the chunk's first.
  const int first_slot = int(chunk.slots.start), slots = int(chunk.slots.size()), size = int(chunk.members.size());
  const int member_start = int(chunk.members.start) - first_slot, member_stop = member_start + size;
  const uint16_t* const ranks = (chunk.queries ? args.sort.ranks_q : args.sort.ranks_k) + chunk.slice * chunk.rows + first_slot;
  const int part = warp * kWarpRows + lane;
  uint32_t held[kChunkLaneRows];
#pragma unroll
  for (int i = 0; i < kChunkLaneRows; ++i) held[i] = part + i * 32 < member_stop ? load_once(ranks + part + i * 32) : 0;
  for (int bin = lane; bin < kBins; bin += 32) starts[warp * kBins + bin] = 0;
  const uint32_t* const counts = slice_counts(args.sort.counts, g, args.q, args.k, chunk.queries, chunk.slice, kBins);
  for (int i = warp; i < levels; i += kChunkWarps) {
    Range segment;
    const Bounds mine = node_bounds(chunks, g, chunk, chunks.level + i, &segment);
    write_places<kBins>(counts, segment, chunk.number, uint32_t(mine.start), places + i * kBins, i == 0 ? own : nullptr);
    if (lane == 0) bounds[i] = mine;
  }
  sync_warp();
  rank_part(starts + warp * kBins, held);
  sync_block();

  // Slots of no node, and dead rows.
  int32_t* const out = args.sort.plan + (chunk.queries ? 0 : g.batch * g.heads_q * g.levels() * g.seq_q) +
                       (chunk.slice * g.levels() + chunks.level) * chunk.rows;
  for (int i = 0; i < levels; ++i) {
    const Bounds b = bounds[i];
    int32_t* const line = out + i * chunk.rows + first_slot;
    if (b.start == b.stop) {
#pragma unroll 4
      for (int slot = thread_index(); slot < slots; slot += kChunkThreads) line[slot] = -1;
    } else if (b.start > first_slot || b.sorted < first_slot + slots) {
      for (int slot = thread_index(); slot < slots; slot += kChunkThreads) {
        const int at = first_slot + slot;
        if (at < b.start || at >= b.sorted) line[slot] = at >= b.sorted && at < b.stop ? at : -1;
      }
    }
  }

  // Counts become the places of each warp's first member of each rank; then the members, rank << 16 | slot, go to their places.
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
    const int slot = part + i * 32;
    if (slot < member_start || slot >= member_stop) continue;
    order[starts[warp * kBins + (held[i] >> 16)] + (held[i] & 0xFFFFu)] = (held[i] & 0xFFFF0000u) | uint32_t(slot);
  }
  sync_block();

  for (int level = 0; level < levels; ++level) {
    if (bounds[level].start == bounds[level].sorted) continue;
    int32_t* const line = out + level * chunk.rows;
    const uint32_t* const place = places + level * kBins;
#pragma unroll 8
    for (int i = thread_index(); i < size; i += kChunkThreads) line[int(place[order[i] >> 16]) + i] = first_slot + int(order[i] & 0xFFFFu);
  }
}

template <int kBins>
void launch_bins(const ChunkArgs& args, const Geometry& g) {
  const int64_t chunks = g.batch * (g.heads_q * args.q.count + g.heads_kv * args.k.count);
  const int levels = g.levels() - args.k.level;
  void* const stream = args.sort.p.stream;
  launch<sort_scan_kernel<kBins>>(g.batch * (g.heads_q + g.heads_kv) * (kBins / kChunkScanThreads), kChunkScanThreads, 0, stream, args);
  const size_t words = kChunkRows + size_t(kChunkWarps + 1 + levels) * kBins;
  launch<sort_chunk_kernel<kBins>>(chunks, kChunkThreads, words * 4 + size_t(levels) * sizeof(Bounds), stream, args);
}

}  // namespace

void launch_sort_chunks(const SortArgs& sort) {
  const Geometry g(sort.p);
  if (!sorts_chunks(g)) return;
  const ChunkArgs args{sort, sort_chunks(g, HA_QUERIES), sort_chunks(g, HA_KEYS)};
  if (chunk_bins(g.a) == 128) launch_bins<128>(args, g);
  else launch_bins<256>(args, g);
}

}  // namespace ha
