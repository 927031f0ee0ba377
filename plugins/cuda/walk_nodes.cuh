// The walk of a tile of one node's sorted rows (selector `sortlsh`, rules 24 to 29): the key blocks that its query blocks take of the
// node's sorted keys, then the node's samples. Rows and keys are gathered by the plan.
#pragma once
#include "walk.cuh"

namespace ha {

// Lies in shared memory. Slots are places in the node's sorted order.
template <class S>
struct NodeWalk {
  using Shape = S;
  static constexpr bool kConsecutive = false;

  HaAttributes a;
  bool empty, far_masked;  // whether some rows see none of the node's last keys, because those are local to them
  int length, head, row0;  // row0: position of query row 0
  int first, last;         // the tile's slots
  int row_start, row_stop, live;  // query rows of the node; how many of them are live
  int key_start, key_stop;        // keys of the node
  uint32_t draw_start;
  uint64_t earlier;  // levels, as bits, of earlier launches
  const int32_t* rows;  // of the plan, from the node's first slot
  const int32_t* keys;
  int query_blocks, first_query_block;
  int list_steps, sample_steps, total;
  int32_t* chosen;  // [query_blocks][2], slots of the keys that a query block takes: the first, and behind the last
  int32_t* counts;  // [query_blocks], how many

  // Whether a tile holds a row. Without keys the rows of a causal node are left as they are; a non-causal one writes what a row without
  // keys has, because there may be no later launch.
  HA_DEVICE static bool present(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch) {
    const Node node = node_of(p, config, g, tile, batch);
    return first_slot(config, tile) < node.rows.size() && !(g.a.causal && node.empty());
  }

  // One thread fills in tile `tile` of a batch row and head ...
  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch, int64_t head_) {
    a = g.a;
    const Node node = node_of(p, config, g, tile, batch);
    empty = node.empty();
    far_masked = a.causal && a.local_overlap;
    length = int(g.length(p.lengths, batch));
    head = int(head_);
    row0 = int(g.first());
    first = int(first_slot(config, tile));
    last = int(min64(first + S::kTileRows, node.rows.size()) - 1);
    row_start = int(node.rows.start);
    row_stop = int(node.rows.stop);
    live = int(node.live);
    key_start = int(node.keys.start);
    key_stop = int(key_start + node.keys.size());
    draw_start = uint32_t(node.start);
    earlier = (uint64_t{1} << config.level) - 1;
    const int64_t levels = g.levels(), kv_head = head_ / g.group();
    rows = p.plan + ((batch * g.heads_q + head_) * levels + config.level) * g.seq_q + row_start;
    keys = p.plan + g.batch * g.heads_q * levels * g.seq_q + ((batch * g.heads_kv + kv_head) * levels + config.level) * g.seq_k + key_start;
    query_blocks = config.query_blocks;
    first_query_block = first / a.block_size;
  }

  HA_DEVICE static int64_t first_slot(const AttendConfig& config, int64_t tile) {
    return int64_t{uint32_t(tile) % uint32_t(config.node_tiles)} * S::kTileRows;
  }
  HA_DEVICE static Node node_of(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch) {
    return g.node(config.level, config.first_node + uint32_t(tile) / uint32_t(config.node_tiles), g.length(p.lengths, batch));
  }

  // ... then, for each of the tile's query blocks, one thread finds the keys that it takes ...
  HA_DEVICE void read_plan(const HaParams&, const Geometry&, int64_t, int q, int lane) {
    if (lane != 0) return;
    const int query_block = first_query_block + q, size = key_stop - key_start;
    Range taken{0, 0};
    if (size > 0 && query_block <= last / a.block_size) taken = taken_blocks(a, query_block, live, size);
    chosen[2 * q] = int(taken.start) * a.block_size;
    chosen[2 * q + 1] = min(int(taken.stop) * a.block_size, size);
    counts[q] = chosen[2 * q + 1] - chosen[2 * q];
  }

  // A plan that names no row of the node leaves it out.
  HA_DEVICE Row row(const Geometry& g, int at) const {
    const int slot = first + at;
    int index = -1;
    if (slot <= last) index = empty ? row_start + slot : rows[slot];
    if (index < row_start || index >= row_stop) return {0, 0, -1, 0};
    const int64_t position = int64_t(row0) + index;
    return {int(g.far(position, length)), slot / a.block_size - first_query_block, index,
            earlier && (g.levels_of(position, length) & earlier) != 0};
  }

  // ... and one thread counts the steps.
  HA_DEVICE void plan_steps(const Geometry&) {
    list_steps = 0;
    for (int q = 0; q < query_blocks; ++q) list_steps += steps_of<S::kKeys>(counts[q]);
    const int size = key_stop - key_start;
    sample_steps = steps_of<S::kKeys>(size == 0 ? 0 : a.stratified ? min(a.sample_size, size) : a.sample_size);
    total = list_steps + sample_steps;
  }

  // A node's rows near its keys see only those that are not local to them (rule 24).
  HA_DEVICE bool masks_listed() const { return far_masked; }

  HA_DEVICE void describe(int j, Step& step) const {
    if (j < list_steps) {
      step.part = Part::kList;
      for (int steps; j >= (steps = steps_of<S::kKeys>(counts[step.owner])); ++step.owner) j -= steps;
    } else {
      step.part = Part::kSample;
      j -= list_steps;
    }
    step.lower = j * S::kKeys;
  }

  HA_DEVICE Mode mode(const Step& step, int w) const {
    const int from = first + w * S::kWarpRows, to = min(from + S::kWarpRows - 1, last);
    if (from > to) return Mode::kSkip;
    if (step.part == Part::kSample) return Mode::kBiased;
    const int start = (first_query_block + step.owner) * a.block_size;
    return to >= start && from < start + a.block_size ? Mode::kBiased : Mode::kSkip;
  }

  // Entry `slot` of a step's list, as in PositionWalk.
  HA_DEVICE Entry find_entry(const Step& step, int slot) const {
    const int entry = step.lower + slot;
    Sample sample{-1, 1.0f};  // its place in the node's sorted keys
    if (step.part == Part::kList) {
      if (entry < counts[step.owner]) sample.key = chosen[2 * step.owner] + entry;
    } else if (entry < a.sample_size) {
      sample = draw_index(a, key_stop - key_start, entry, head, draw_start);
    }
    const int key = sample.key >= 0 ? keys[sample.key] : -1;
    return {key < key_start || key >= key_stop ? -1 : key, int(sample.key), sample.weight};
  }

  HA_DEVICE void write_entry(const Step& step, const Entry& entry, int slot, int q0, int stride, float factor, int32_t* list,
                             float* bias) const {
    if (q0 == 0) list[slot] = entry.key;
    const float value = log2f(entry.weight) / factor;
    for (int q = q0; q < query_blocks; q += stride) {
      const bool taken = entry.place >= chosen[2 * q] && entry.place < chosen[2 * q + 1];
      const bool visible = entry.key >= 0 && (step.part == Part::kList ? q == step.owner : !taken);
      bias[q * S::kKeys + slot] = visible ? value : -INFINITY;
    }
  }
};

}  // namespace ha
