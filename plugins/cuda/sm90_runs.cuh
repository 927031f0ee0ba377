// Attention over runs of consecutive keys alone: the exact path, and local part and sinks of `sortlsh` and of causal `blocks`. What the
// steps of a tile are, and where its queries, the ring of keys and values and the barriers lie. Nothing is listed, and nobody plans: all
// work out their steps.
#pragma once
#include "sm90_tile.cuh"

namespace ha {

template <int P>
struct RunBlock {
  static constexpr RunTable kTable = run_table(P);
  static constexpr int kBuffers = kTable.buffers, kKeys = kTable.keys, kRows = kTable.rows();
  static constexpr int kQueryBytes = kRows * P * 2, kBufferBytes = kKeys * P * 2;
  // A buffer is filled when every loading thread has announced its copies, or the first of them for tile loads and all.
  static constexpr int kFills = 32;

  uint32_t base;

  HA_DEVICE uint32_t queries(int parity) const { return base + parity * kQueryBytes; }
  HA_DEVICE uint32_t buffer(int index) const { return base + 2 * kQueryBytes + index * kBufferBytes; }
  HA_DEVICE uint32_t full(int index) const { return base + runs_barriers(P) + index * 8; }
  HA_DEVICE uint32_t free(int index) const { return full(kBuffers + index); }
  HA_DEVICE uint32_t queries_ready(int parity) const { return full(2 * kBuffers + parity); }
  HA_DEVICE uint32_t queries_free(int parity) const { return full(2 * kBuffers + 2 + parity); }

  HA_DEVICE void init_barriers() const {
    constexpr int kReaders = 4 * kTable.groups;  // warps
    for (int i = 0; i < kBuffers; ++i) barrier_init(full(i), kFills), barrier_init(free(i), kReaders);
    for (int i = 0; i < 2; ++i) barrier_init(queries_ready(i), 1), barrier_init(queries_free(i), kReaders);
    barrier_publish();
  }
};

// What a tile of consecutive query positions meets: steps of its local part, then of the sinks (rules 6 to 9, 13).
template <int P>
struct RunWalk {
  static constexpr int kKeys = run_table(P).keys, kRows = run_table(P).rows();

  bool exact;
  int length, row0, first, first_row, last_row, local_start, local_steps, total;

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
    if (!exact) total += steps_of<kKeys>(min(g.a.sinks, min(far(g, exact, last_row, length), length)));
  }
  // Whether the row at `position` has met keys in launches before, if there were any: what is behind the sinks and before its local part, or,
  // with nodes, before the last local block that a node of its own ends at.
  HA_DEVICE bool met_before(const Geometry& g, int position) const {
    int stop = far(g, false, position, length);
    if (g.sorts() && g.a.causal) stop = (max(position, 0) / g.a.local_size >> g.a.local_overlap << g.a.local_overlap) * g.a.local_size;
    return min(stop, length) > g.a.sinks;
  }
  HA_DEVICE int key(int j) const { return j < local_steps ? local_start + j * kKeys : (j - local_steps) * kKeys; }
  // Which keys of step j the row at `position` sees; both bounds grow with the position.
  HA_DEVICE Bounds bounds(const Geometry& g, int j, int position) const {
    const int limit = far(g, exact, position, length);
    if (j < local_steps) return {limit, g.a.causal ? min(position + 1, length) : length};
    return {0, min(min(g.a.sinks, limit), length)};
  }
};

}  // namespace ha
