// Attention over runs of consecutive keys alone: the exact path, and local part and sinks of `sortlsh` and of causal `blocks`. What the
// steps of a tile are, and where its queries, the ring of keys and values and the barriers lie. Nothing is listed: the loading warp
// describes a tile when it loads its queries.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

// Of one part of the walk, a group takes part in steps start to stop - 1 and masks those before `plain` and from `edge` on.
struct alignas(16) RunSpan {
  int start, plain, edge, stop;
};

// What a tile of consecutive query positions meets: steps of its local part, then of the sinks (rules 6 to 9, 13).
template <int P>
struct RunWalk {
  static constexpr int kKeys = run_table(P).keys, kRows = run_table(P).rows();

  bool exact;
  int length, row0, first, first_row, last_row, local_start, local_steps, total;
  int border;  // rows before it are all of the first row's local block

  HA_DEVICE static int far(const Geometry& g, bool exact, int position, int length) {
    if (exact) return 0;
    if (!g.a.causal) return length;
    if (position < 0) return 0;
    const int c = position / g.a.local_size - g.a.local_overlap;
    return c > 0 ? c * g.a.local_size : 0;
  }
  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int tile, int batch) {
    exact = g.exact();
    length = int(g.length(p.lengths, batch));
    row0 = int(g.first());
    first = (int(config.first_tile + config.tiles) - 1 - tile) * kRows;  // causal: the longest first
    first_row = max(first, row0);
    last_row = min(first + kRows, int(row0 + g.seq_q)) - 1;
    const int stop = g.a.causal ? min(last_row + 1, length) : length;
    local_start = far(g, exact, first_row, length);
    local_steps = exact || g.a.causal ? steps_of<kKeys>(stop - local_start) : 0;
    total = local_steps;
    border = exact || !g.a.causal ? INT32_MAX : (max(first_row, 0) / g.a.local_size + 1) * g.a.local_size;
    if (!exact) total += steps_of<kKeys>(min(g.a.sinks, min(far(g, exact, last_row, length), length)));
  }
  // Whether the row at `position` has met keys in launches before, if there were any: what is behind the sinks and before its local part,
  // or, with nodes, before the last local block that a node of its own ends at.
  HA_DEVICE bool met_before(const Geometry& g, int position) const {
    int stop = far(g, false, position, length);
    if (g.sorts() && g.a.causal) stop = (max(position, 0) / g.a.local_size >> g.a.local_overlap << g.a.local_overlap) * g.a.local_size;
    return min(stop, length) > g.a.sinks;
  }
  HA_DEVICE int key(int j) const { return j < local_steps ? local_start + j * kKeys : (j - local_steps) * kKeys; }
  // A group's steps of the local part or of the sinks.
  HA_DEVICE RunSpan span(const Geometry& g, int group, bool sinks) const {
    const int begin = sinks ? local_steps : 0, start = key(begin);
    const int from = max(first + group * kGroupRows, first_row), to = min(first + group * kGroupRows + kGroupRows - 1, last_row);
    const Bounds low = bounds(g, begin, from), high = bounds(g, begin, to);
    // Steps of sinks are masked, never passed over, where the tile's last rows alone have them: a group that holds its last values'
    // buffer may pass over no more than the ring can still load, which those could exceed.
    const int stop = sinks ? total : min(begin + steps_of<kKeys>(high.high - start), local_steps);
    return {begin + (low.low - start) / kKeys, begin + steps_of<kKeys>(high.low - start), begin + (low.high - start) / kKeys,
            from <= to ? stop : begin};
  }
  // Which keys of step j the row at `position` sees; both bounds grow with the position.
  HA_DEVICE Bounds bounds(const Geometry& g, int j, int position) const {
    const int limit = position < border ? local_start : far(g, exact, position, length);  // mostly without a division
    if (j < local_steps) return {limit, g.a.causal ? min(position + 1, length) : length};
    return {0, min(min(g.a.sinks, limit), length)};
  }
};

// A tile as the loading warp describes it.
template <int P>
struct RunTile {
  RunWalk<P> walk;
  int slice;
  RunSpan spans[run_table(P).groups][2];  // of each group: of the local part, of the sinks
};

// What lies where in a block's shared memory.
template <int P>
struct RunBlock {
  static_assert(sizeof(RunTile<P>) <= kRunTileBytes);
  static constexpr RunTable kTable = run_table(P);
  static constexpr int kBuffers = kTable.buffers, kKeys = kTable.keys, kRows = kTable.rows();
  static constexpr int kQueryBytes = kRows * P * 2, kBufferBytes = kKeys * P * 2;
  // A buffer is filled when every loading thread has announced its copies, or the first of them for tile loads and all.
  static constexpr int kFills = 32;

  unsigned char* shared;
  uint32_t base;

  HA_DEVICE uint32_t queries(int parity) const { return base + parity * kQueryBytes; }
  HA_DEVICE uint32_t buffer(int index) const { return base + 2 * kQueryBytes + index * kBufferBytes; }
  HA_DEVICE uint32_t full(int index) const { return base + runs_barriers(P) + index * 8; }
  HA_DEVICE uint32_t free(int index) const { return full(kBuffers + index); }
  HA_DEVICE uint32_t queries_ready(int parity) const { return full(2 * kBuffers + parity); }
  HA_DEVICE uint32_t queries_free(int parity) const { return full(2 * kBuffers + 2 + parity); }

  HA_DEVICE RunTile<P>& tile(int parity) const { return reinterpret_cast<RunTile<P>*>(shared + runs_tiles(P))[parity]; }

  HA_DEVICE void init_barriers() const {
    constexpr int kWorkers = 128 * kTable.groups;
    for (int i = 0; i < kBuffers; ++i) barrier_init(full(i), kFills), barrier_init(free(i), kWorkers / 32);
    for (int i = 0; i < 2; ++i) barrier_init(queries_ready(i), kTable.groups), barrier_init(queries_free(i), kWorkers);
    barrier_publish();
  }
};

}  // namespace ha
