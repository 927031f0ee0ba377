// The steps of one attention tile: which 64 keys come next, and which of them a row may see (rules 6 to 9, 13 to 16, 19).
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace ha {

enum class Part : int { kLocal, kSinks, kPair, kList, kSample };

// How a warp treats a step: no row sees a key, every row sees all, consecutive keys cut by rows, or by the list's biases.
enum class Mode : int { kSkip, kPlain, kMasked, kBiased };

// kLocal, kSinks, kPair: keys lower .. + 31 and upper .. + 31; of a pair the first belong to the tile's lower 64 rows, the
// others to its upper ones, and -1 = none. kList and kSample: keys and biases lie in the step's list; `owner` is the query
// block or local block that the list belongs to and `lower` its first entry.
struct alignas(16) Step {
  int lower, upper, owner;
  Part part;
  Mode modes[kAttendThreads / 32];  // of each warp

  HA_DEVICE bool listed() const { return part == Part::kList || part == Part::kSample; }
};

// What masks need to know of a query row.
struct Row {
  int far, query_block;  // first key that is not local; query block, counted from the tile's first
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
  int warp_first[kAttendThreads / 32], warp_last[kAttendThreads / 32];  // of each warp's; first > last: it has none
  int query_blocks, first_query_block;    // query blocks the tile may touch
  int sampled_local;                      // the tile's first local block that has samples
  int local_start, local_steps, sink_steps, heavy_steps, sample_list_steps, total;
  int32_t* chosen;  // [query_blocks][num_blocks]
  int32_t* counts;  // [query_blocks]

  HA_DEVICE int far(int position) const {
    if (exact) return 0;
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
  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int first, int64_t batch, int64_t head_) {
    a = g.a;
    exact = g.exact();
    length = int(g.length(p.lengths, batch));
    head = int(head_);
    first_row = int(max64(first, g.first()));
    last_row = int(min64(int64_t(first) + kTileRows, g.first() + g.seq_q) - 1);
    for (int w = 0; w < kAttendThreads / 32; ++w) {
      warp_first[w] = max(first + w * kWarpRows, first_row);
      warp_last[w] = min(first + w * kWarpRows + kWarpRows - 1, last_row);
    }
    query_blocks = config.query_blocks;
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

  HA_DEVICE Row row(int position) const { return {far(position), exact ? 0 : (position - first_query_block * a.block_size) / a.block_size}; }

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

  // The keys that a row at `position` with far(position) = `limit` sees of a step of consecutive keys.
  HA_DEVICE Bounds bounds(Part part, int position, int limit) const {
    if (part == Part::kLocal) return {limit, a.causal ? min(position + 1, length) : length};
    return {part == Part::kSinks ? 0 : a.sinks, min(part == Part::kSinks ? min(a.sinks, limit) : limit, length)};
  }

  // Writes step j, as far as warp `w` is concerned; warp 0's caller writes what they share.
  HA_DEVICE void write_step(int j, int w, Step* target) const {
    Step step{};
    describe(j, step);
    if (w == 0) {
      target->lower = step.lower;
      target->upper = step.upper;
      target->owner = step.owner;
      target->part = step.part;
    }
    target->modes[w] = mode(step, w);
  }

 private:
  HA_DEVICE void describe(int j, Step& step) const {
    if (j < local_steps + sink_steps) {
      step.part = j < local_steps ? Part::kLocal : Part::kSinks;
      step.lower = j < local_steps ? local_start + j * kTileKeys : (j - local_steps) * kTileKeys;
      step.upper = step.lower + kTileKeys / 2;
      return;
    }
    j -= local_steps + sink_steps;
    if (j < heavy_steps && pairs()) {
      step.part = Part::kPair;
      const int at = j / 2, part = j % 2 * (kTileKeys / 2);
      step.lower = at < counts[0] ? chosen[at] * kTileKeys + part : -1;
      step.upper = at < counts[1] ? chosen[a.num_blocks + at] * kTileKeys + part : -1;
    } else if (j < heavy_steps) {
      step.part = Part::kList;
      for (int steps; j >= (steps = steps_of(counts[step.owner] * a.block_size)); ++step.owner) j -= steps;
      step.lower = j * kTileKeys;
    } else {
      step.part = Part::kSample;
      j -= heavy_steps;
      step.owner = sampled_local + j / sample_list_steps;
      step.lower = j % sample_list_steps * kTileKeys;
    }
  }

  HA_DEVICE Mode mode(const Step& step, int w) const {
    const int first = warp_first[w], last = warp_last[w];
    if (first > last) return Mode::kSkip;
    if (step.part == Part::kSample) return Mode::kBiased;
    if (step.part == Part::kList) {
      const int start = (first_query_block + step.owner) * a.block_size;
      return last >= start && first < start + a.block_size ? Mode::kBiased : Mode::kSkip;
    }
    // Both bounds grow with the position.
    const bool pair = step.part == Part::kPair;
    const int start = pair && w >= kAttendThreads / 64 ? step.upper : step.lower, stop = start + (pair ? kTileKeys / 2 : kTileKeys);
    const Bounds low = bounds(step.part, first, far(first)), high = bounds(step.part, last, far(last));
    if (start < 0 || start >= high.high || stop <= low.low) return Mode::kSkip;
    return start >= high.low && stop <= low.high ? Mode::kPlain : Mode::kMasked;
  }

 public:
  // Entry `slot` of a kList or kSample step: writes its key (-1 = none) and its bias for query blocks q0, q0 + stride, ...
  // (-inf = masked), in units of logits before `factor` turns them into base 2.
  HA_DEVICE void write_entry(const Step& step, int slot, int q0, int stride, float factor, int32_t* keys, float* bias) const {
    const int at = step.lower + slot;
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
    const float value = log2f(weight) / factor;
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
