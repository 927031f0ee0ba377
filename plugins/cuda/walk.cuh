// The steps of one attention tile: which 64 keys come next, and which of them a row may see (rules 6 to 9, 13 to 16, 19).
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace ha {

enum class Part : int { kLocal, kSinks, kPair, kList, kSample };

// kLocal, kSinks: keys start .. + 63. kPair: keys start .. + 31 for the tile's lower 64 rows, upper .. + 31 for the upper;
// -1 = none. kList and kSample: keys and biases lie in the step's list; `owner` is the query block or local block that the
// list belongs to and `start` its first entry.
struct Step {
  Part part;
  int start, upper, owner;

  HA_DEVICE bool listed() const { return part == Part::kList || part == Part::kSample; }
};

struct Bounds {
  int low, high;  // a row sees keys low <= j < high
};

// Everything about one tile that does not change between steps; lies in shared memory, because registers are short.
// Positions and keys fit int: the sequence is below 2^31.
struct Walk {
  HaAttributes a;
  bool exact;
  int length, head, first_row, last_row;  // positions of the tile's first and last query row
  int query_blocks, first_query_block;    // query blocks the tile may touch
  int sampled_local;                      // the tile's first local block that has samples
  int local_start, local_steps, sink_steps, heavy_steps, sample_list_steps, total;
  int32_t* chosen;  // [query_blocks][num_blocks]
  int32_t* counts;  // [query_blocks]

  HA_DEVICE int far(int position) const {
    if (exact) return a.causal ? 0 : length;
    if (!a.causal) return length;
    if (position < 0) return 0;
    const int64_t c = position / a.local_size - a.local_overlap;
    return c > 0 ? int(c * a.local_size) : 0;
  }

  HA_DEVICE int sample_candidates(int local_block) const {
    const int far = a.causal ? max(0, local_block - a.local_overlap) * a.local_size : length;
    return max(0, min(far, length) - a.sinks);
  }

  HA_DEVICE bool pairs() const { return a.block_size == kTileKeys; }

  // One thread fills in the tile of query positions first .. first + kTileRows - 1 ...
  HA_DEVICE void start(const AttendArgs& args, const Geometry& g, int first, int64_t batch, int64_t head_) {
    a = g.a;
    exact = g.exact();
    length = int(g.length(args.p.lengths, batch));
    head = int(head_);
    first_row = int(max64(first, g.first()));
    last_row = int(min64(int64_t(first) + kTileRows, g.first() + g.seq_q) - 1);
    query_blocks = args.config.query_blocks;
    first_query_block = int(floor_div(first, a.block_size));
  }

  // ... then some threads read the plan of the tile's query blocks, up to the first entry that is no key block ...
  HA_DEVICE void read_plan(const Geometry& g, const int32_t* plan, int64_t slice, int q) {
    const Range blocks = g.query_blocks();
    const int64_t query_block = int64_t(first_query_block) + q, limit = ceil_div(g.seq_k, a.block_size);
    int count = 0;
    if (query_block >= blocks.start && query_block < blocks.stop) {
      const int32_t* const row = plan + (slice * blocks.size() + query_block - blocks.start) * a.num_blocks;
      for (int block; count < a.num_blocks && (block = row[count]) >= 0 && block < limit; ++count)
        chosen[q * a.num_blocks + count] = block;
    }
    counts[q] = count;
  }

  // ... and one thread counts the steps.
  HA_DEVICE void plan_steps(const Geometry& g) {
    const int stop = a.causal ? min(last_row + 1, length) : length;
    local_start = exact ? 0 : far(first_row);
    local_steps = exact || a.causal ? steps_of(stop - local_start) : 0;
    sink_steps = heavy_steps = sampled_local = 0;
    sample_list_steps = steps_of(a.sample_size);
    total = local_steps;
    if (exact) return;
    sink_steps = steps_of(min(a.sinks, min(far(last_row), length)));
    if (pairs()) {
      heavy_steps = 2 * max(counts[0], counts[1]);
    } else {
      for (int q = 0; q < query_blocks; ++q) heavy_steps += steps_of(counts[q] * a.block_size);
    }
    const int last_local = int(g.local_block(last_row));
    sampled_local = int(g.local_block(first_row));
    while (sampled_local <= last_local && sample_candidates(sampled_local) == 0) ++sampled_local;
    total += sink_steps + heavy_steps + sample_list_steps * (last_local - sampled_local + 1);
  }

  HA_DEVICE static int steps_of(int keys) { return keys > 0 ? (keys + kTileKeys - 1) / kTileKeys : 0; }

  HA_DEVICE Step describe(int j) const {
    if (j < local_steps) return {Part::kLocal, local_start + j * kTileKeys, 0, 0};
    j -= local_steps;
    if (j < sink_steps) return {Part::kSinks, j * kTileKeys, 0, 0};
    j -= sink_steps;
    if (j < heavy_steps) {
      if (pairs()) {
        const int at = j / 2, part = j % 2 * (kTileKeys / 2);
        return {Part::kPair, at < counts[0] ? chosen[at] * kTileKeys + part : -1,
                at < counts[1] ? chosen[a.num_blocks + at] * kTileKeys + part : -1, 0};
      }
      int q = 0;
      for (int steps; j >= (steps = steps_of(counts[q] * a.block_size)); ++q) j -= steps;
      return {Part::kList, j * kTileKeys, 0, q};
    }
    j -= heavy_steps;
    return {Part::kSample, j % sample_list_steps * kTileKeys, 0, sampled_local + j / sample_list_steps};
  }

  // The keys that a row at `position` sees of a step of consecutive keys.
  HA_DEVICE Bounds bounds(Part part, int position) const {
    if (exact) return {0, a.causal ? min(position + 1, length) : length};
    if (part == Part::kLocal) return {far(position), min(position + 1, length)};
    if (part == Part::kSinks) return {0, min(a.sinks, min(far(position), length))};
    return {a.sinks, min(far(position), length)};
  }

  // Entry `slot` of a kList or kSample step: writes its key (-1 = none) and its bias for query blocks q0, q0 + stride, ...
  // (-inf = masked).
  HA_DEVICE void write_entry(const Step& step, int slot, int q0, int stride, int32_t* keys, float* bias) const {
    const int at = step.start + slot;
    int key = -1;
    float weight = 1.0f;
    if (step.part == Part::kList) {
      const int limit = min(far((first_query_block + step.owner) * a.block_size), length);
      if (at < counts[step.owner] * a.block_size)
        key = chosen[step.owner * a.num_blocks + at / a.block_size] * a.block_size + at % a.block_size;
      if (key < a.sinks || key >= limit) key = -1;
    } else if (at < a.sample_size) {
      const Sample sample = draw_sample(a, sample_candidates(step.owner), at, head, a.causal ? int64_t(step.owner) * a.local_size : 0);
      key = int(sample.key);
      weight = sample.weight;
    }
    if (q0 == 0) keys[slot] = key;
    const float value = log2f(weight);
    for (int q = q0; q < query_blocks; q += stride) {
      bool visible = key >= 0;
      if (step.part == Part::kList) {
        visible = visible && q == step.owner;
      } else {
        visible = visible && (!a.causal || (first_query_block + q) * a.block_size / a.local_size == step.owner);
        for (int i = 0; i < counts[q] && visible; ++i) visible = chosen[q * a.num_blocks + i] != key / a.block_size;
      }
      bias[q * kTileKeys + slot] = visible ? value : -INFINITY;
    }
  }
};

}  // namespace ha
