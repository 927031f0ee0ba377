// The sorted rows and keys of the nodes of `sortlsh` (rules 24 to 28) that are not sorted by chunks: a stable counting sort by rank, one
// block of threads a node, side and head. Each warp owns a contiguous part and counts for itself, so that no order is left to chance.
#include "kernels.h"
#include "launch.cuh"
#include "sort.cuh"

namespace ha {
namespace {

constexpr int kBinWarps = kSortBins / 32;
constexpr int kBatch = 4;  // groups of 32 elements whose ranks are fetched at once

// What one block of threads writes: a node and the segment beside it, whose slots belong to no node of this level and side.
struct Span {
  int level;
  int64_t slice;      // batch and head
  Range slots;        // rows or keys of both segments
  Range node;         // of the node; empty where it does nothing
  Range sorted;       // the node's slots without those of dead rows
  bool queries;
};

struct NodeArgs {
  SortArgs sort;
  int32_t levels, threads;  // the lowest levels are sorted here
};

HA_DEVICE Span find_span(const NodeArgs& args, const Geometry& g) {
  Span span{};
  int64_t at = block_index(), count_q = 0;
  Range spans_q{}, spans_k{};
  // The upper levels have the largest nodes: first.
  for (span.level = args.levels - 1; span.level >= 0; --span.level) {
    spans_q = sort_spans(g, span.level, HA_QUERIES);
    spans_k = sort_spans(g, span.level, HA_KEYS);
    count_q = g.batch * g.heads_q * spans_q.size();
    const int64_t count = count_q + g.batch * g.heads_kv * spans_k.size();
    if (at < count) break;
    at -= count;
  }
  span.queries = at < count_q;
  if (!span.queries) at -= count_q;
  const Range spans = span.queries ? spans_q : spans_k;
  const int64_t m = spans.start + at % spans.size(), heads = span.queries ? g.heads_q : g.heads_kv;
  span.slice = at / spans.size();

  const int64_t rows = span.queries ? g.seq_q : g.seq_k, first = span.queries ? g.first() : 0;
  span.slots = {0, rows};
  if (g.a.causal) {
    const int64_t size = 2 * g.segment(span.level), low = m * size - first;
    span.slots = {max64(low, 0), min64(low + size, rows)};
  }
  const int64_t length = g.length(args.sort.p.lengths, span.slice / heads);
  const Range nodes = g.nodes_of_level(span.level);
  if (m < nodes.start || m >= nodes.stop) return span;
  const Node node = g.node(span.level, m, length);
  if (node.empty()) return span;
  span.node = span.sorted = span.queries ? node.rows : node.keys;
  if (span.queries) span.sorted.stop = span.sorted.start + node.live;
  return span;
}

// One digit's pass over a node: source (null: the members themselves, in order) -> target, both indexed by slot.
struct Pass {
  const uint16_t* ranks;
  const int32_t* source;
  int32_t* target;
  int64_t first;  // slot
  int count, shift;
  uint32_t* counts;  // shared: [warps, kSortBins], and behind them kBinWarps sums

  // Calls body(index, digit, lanes of that digit) for the warp's part, 32 elements at a time.
  template <class Body>
  HA_DEVICE void each(int warp, int lane, int warps, Body body) const {
    const int part = (count + warps * 32 - 1) / (warps * 32) * 32, start = warp * part, stop = min(start + part, count);
    for (int base = start; base < stop; base += 32 * kBatch) {
      int index[kBatch], digit[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = base + i * 32 + lane;
        index[i] = at < stop ? (source ? source[first + at] : int(first) + at) : -1;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) digit[i] = index[i] >= 0 ? load_once(ranks + index[i]) >> shift & (kSortBins - 1) : 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (base + i * 32 < stop) body(index[i], digit[i], same_digit<kSortBins>(uint32_t(digit[i]), index[i] >= 0));
    }
  }

  HA_DEVICE void run(int warp, int lane, int warps) const {
    uint32_t* const mine = counts + warp * kSortBins;
    for (int bin = lane; bin < kSortBins; bin += 32) mine[bin] = 0;
    sync_warp();
    const uint32_t below = (1u << lane) - 1;
    each(warp, lane, warps, [&](int index, int digit, uint32_t peers) {
      if (index >= 0 && !(peers & below)) mine[digit] += count_bits(peers);
      sync_warp();
    });
    sync_block();
    scan(warp, lane, warps);
    each(warp, lane, warps, [&](int index, int digit, uint32_t peers) {
      const uint32_t start = mine[digit];
      sync_warp();
      if (index >= 0) {
        target[first + start + count_bits(peers & below)] = index;
        if (!(peers & below)) mine[digit] = start + count_bits(peers);
      }
      sync_warp();
    });
    sync_block();
  }

 private:
  // Counts become the places of each warp's first element of each digit: digits ascend, within a digit the warps.
  HA_DEVICE void scan(int warp, int lane, int warps) const {
    uint32_t* const sums = counts + warps * kSortBins;
    const int bin = thread_index();
    uint32_t start = 0;
    if (warp < kBinWarps) {
      uint32_t total = 0;
      for (int w = 0; w < warps; ++w) total += counts[w * kSortBins + bin];
      start = sum_below(total, lane);
      if (lane == 31) sums[warp] = start + total;
    }
    sync_block();
    if (warp < kBinWarps) {
      for (int w = 0; w < warp; ++w) start += sums[w];
      for (int w = 0; w < warps; ++w) {
        const uint32_t count = counts[w * kSortBins + bin];
        counts[w * kSortBins + bin] = start;
        start += count;
      }
    }
    sync_block();
  }
};

HA_KERNEL(kSortMostThreads, 1) sort_node_kernel(const HA_CONSTANT NodeArgs args) {
  const Geometry g(args.sort.p);
  const Span span = find_span(args, g);
  const int64_t rows = span.queries ? g.seq_q : g.seq_k;
  const int64_t start = (span.queries ? 0 : g.batch * g.heads_q * g.levels() * g.seq_q) + (span.slice * g.levels() + span.level) * rows;
  int32_t* const out = args.sort.plan + start;
  for (int64_t slot = span.slots.start + thread_index(); slot < span.slots.stop; slot += args.threads) {
    if (slot < span.node.start || slot >= span.node.stop) out[slot] = -1;
    else if (slot >= span.sorted.stop) out[slot] = int32_t(slot);  // a dead row: they follow the live ones anyway
  }
  const int count = int(span.sorted.size());
  if (count == 0) return;
  const uint16_t* const ranks = (span.queries ? args.sort.ranks_q : args.sort.ranks_k) + span.slice * rows;
  const int warp = thread_index() / 32, lane = thread_index() % 32, warps = args.threads / 32;
  Pass pass{ranks, nullptr, out, span.sorted.start, count, 0, reinterpret_cast<uint32_t*>(shared_memory())};
  if (args.sort.scratch) {
    pass.target = args.sort.scratch + start;
    pass.run(warp, lane, warps);
    pass.source = pass.target;
    pass.target = out;
    pass.shift = kSortDigitBits;
  }
  pass.run(warp, lane, warps);
}

}  // namespace

void launch_sort_nodes(const SortArgs& sort) {
  const Geometry g(sort.p);
  const NodeArgs args{sort, node_levels(g), sort_threads(g)};
  int64_t blocks = 0;
  for (int level = 0; level < args.levels; ++level)
    blocks += g.batch * (g.heads_q * sort_spans(g, level, HA_QUERIES).size() + g.heads_kv * sort_spans(g, level, HA_KEYS).size());
  launch<sort_node_kernel>(blocks, args.threads, size_t(args.threads / 32 * kSortBins + kBinWarps) * 4, sort.p.stream, args);
}

}  // namespace ha
