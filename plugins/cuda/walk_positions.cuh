// The walk of a tile of consecutive query positions (rules 6 to 9, 13 to 16, 19): everything of `blocks` and of the exact path, local
// part and sinks of `sortlsh`.
#pragma once
#include "walk.cuh"

namespace ha {

// Everything about one tile that does not change between steps; lies in shared memory, because registers are short.
// Positions and keys fit int: the sequence is below 2^31.
template <class S>
struct PositionWalk {
  using Shape = S;
  static constexpr bool kConsecutive = true;  // rows of the tile, and keys of some steps
  static constexpr int kPairBlocks = S::kKeys / S::kPairBlock;  // of a step, where pairs are owned

  HaAttributes a;
  bool exact, listed, stored;
  int length, head, first, first_row, last_row;  // positions of the tile and of its first and last query row
  int row0;                                      // position of query row 0
  int warp_first[S::kWarps], warp_last[S::kWarps];  // positions of each warp's rows; first > last: it has none
  int query_blocks, first_query_block;              // query blocks the tile may touch
  int sampled_local;                                // the tile's first local block that has samples
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

  HA_DEVICE bool pairs() const { return S::kPairs && a.block_size == S::kPairBlock; }

  // One thread fills in tile `tile` of a batch row and head ...
  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch, int64_t head_) {
    a = g.a;
    exact = g.exact();
    listed = config.query_blocks > 0;
    stored = config.stored;
    length = int(g.length(p.lengths, batch));
    head = int(head_);
    first = first_position(config, tile);
    row0 = int(g.first());
    first_row = max(first, row0);
    last_row = int(min64(int64_t(first) + S::kTileRows, g.first() + g.seq_q) - 1);
    for (int w = 0; w < S::kWarps; ++w) {
      warp_first[w] = max(first + w * S::kWarpRows, first_row);
      warp_last[w] = min(first + w * S::kWarpRows + S::kWarpRows - 1, last_row);
    }
    query_blocks = config.query_blocks;
    first_query_block = first / a.block_size - (first % a.block_size < 0);
  }

  // Causal: the longest first.
  HA_DEVICE static int first_position(const AttendConfig& config, int64_t tile) {
    return int((config.first_tile + config.tiles - 1 - tile) * S::kTileRows);
  }
  // Row index of the tile's row `slot`, before the walk has started.
  HA_DEVICE static int row_index(const AttendConfig& config, const Geometry& g, int64_t tile, int slot) {
    const int64_t index = int64_t(first_position(config, tile)) + slot - g.first();
    return index >= 0 && index < g.seq_q ? int(index) : -1;
  }

  // ... then, for each of the tile's query blocks, a warp reads the plan, up to the first entry that is no key block ...
  HA_DEVICE void read_plan(const HaParams& p, const Geometry& g, int64_t slice, int q, int lane) {
    const Range blocks = g.query_blocks();
    const int64_t query_block = int64_t(first_query_block) + q, limit = ceil_div(g.seq_k, a.block_size);
    int count = 0;
    if (query_block >= blocks.start && query_block < blocks.stop) {
      const int32_t* const row = p.plan + (slice * blocks.size() + query_block - blocks.start) * a.num_blocks;
      for (int from = 0, read = 32; from < a.num_blocks && read == 32; from += 32) {
        const int block = from + lane < a.num_blocks ? row[from + lane] : -1;
        const uint32_t votes = ballot(block >= 0 && block < limit);
        read = count_bits(votes & ~(votes + 1));  // lanes before the first that has none
        if (lane < read) chosen[q * a.num_blocks + from + lane] = block;
        count += read;
      }
    }
    if (lane == 0) counts[q] = count;
  }

  HA_DEVICE Row row(const Geometry& g, int slot) const {
    const int position = first + slot;
    const bool present = position >= first_row && position <= last_row;
    return {far(position), listed ? (position - first_query_block * a.block_size) / a.block_size : 0, present ? position - row0 : -1,
            present && stored && g.levels_of(position, length) != 0};
  }

  // ... and one thread counts the steps.
  HA_DEVICE void plan_steps(const Geometry&) {
    const int stop = a.causal ? min(last_row + 1, length) : length;
    local_start = exact ? 0 : far(first_row);
    local_steps = exact || a.causal ? steps_of<S::kKeys>(stop - local_start) : 0;
    sink_steps = heavy_steps = sampled_local = 0;
    total = local_steps;
    if (exact) return;
    sink_steps = steps_of<S::kKeys>(min(a.sinks, min(far(last_row), length)));
    total += sink_steps;
    if (!listed) return;
    if (pairs()) {
      int most = 0;
      for (int q = 0; q < query_blocks; ++q) most = max(most, counts[q]);
      heavy_steps = S::kOwnedPairs ? query_blocks * ((most + kPairBlocks - 1) / kPairBlocks) : 2 * most;
    } else {
      for (int q = 0; q < query_blocks; ++q) heavy_steps += steps_of<S::kKeys>(counts[q] * a.block_size);
    }
    total += heavy_steps + sample_steps();
  }
  HA_DEVICE int local_block(int position) const { return a.causal ? position / a.local_size - (position % a.local_size < 0) : 0; }
  HA_DEVICE int sample_steps() {
    const int last_local = local_block(last_row);
    sampled_local = local_block(first_row);
    while (sampled_local <= last_local && sample_candidates(sampled_local) == 0) ++sampled_local;
    sample_list_steps = steps_of<S::kKeys>(a.sample_size);
    return sample_list_steps * (last_local - sampled_local + 1);
  }

  // Which consecutive keys the row of warp row `slot` sees; `limit` = its first key that is not local.
  HA_DEVICE Bounds bounds(Part part, int slot, int limit) const { return bounds_at(part, first + slot, limit); }
  HA_DEVICE Bounds bounds_at(Part part, int position, int limit) const {
    if (part == Part::kLocal) return {limit, a.causal ? min(position + 1, length) : length};
    return {part == Part::kSinks ? 0 : a.sinks, min(part == Part::kSinks ? min(a.sinks, limit) : limit, length)};
  }
  HA_DEVICE bool every_warp() const { return warp_first[0] <= warp_last[0] && warp_first[S::kWarps - 1] <= warp_last[S::kWarps - 1]; }
  HA_DEVICE bool masks_listed() const { return false; }  // the biases say it all

  // Owned pairs are spread over the steps that all rows share: each loads keys for a part of the rows only, and memory gets time for
  // them. Gives j's place in the order of describe.
  HA_DEVICE int spread(int j) const {
    const int shared = local_steps + sink_steps;
    if (heavy_steps == 0 || j >= shared + heavy_steps) return j;
    const int rounds = heavy_steps / query_blocks, run = shared / rounds, period = run + query_blocks;
    const int round = j / period, at = j % period;
    if (round >= rounds) return j - heavy_steps;
    return at < run ? round * run + at : shared + round * query_blocks + at - run;
  }

  HA_DEVICE void describe(int j, Step& step) const {
    if constexpr (S::kOwnedPairs) {
      if (pairs()) j = spread(j);
    }
    if (j < local_steps + sink_steps) {
      step.part = j < local_steps ? Part::kLocal : Part::kSinks;
      step.lower = j < local_steps ? local_start + j * S::kKeys : (j - local_steps) * S::kKeys;
      step.upper = step.lower + S::kKeys / 2;
      return;
    }
    j -= local_steps + sink_steps;
    if (j < heavy_steps && pairs()) {
      step.part = Part::kPair;
      if constexpr (S::kOwnedPairs) {
        static_assert(kPairBlocks == 2);
        const int at = j / query_blocks * kPairBlocks;  // the query blocks take turns
        step.owner = j % query_blocks;
        const int32_t* const blocks = chosen + step.owner * a.num_blocks;
        const int start = at < counts[step.owner] ? blocks[at] * S::kPairBlock : -1;
        step.lower = start;
        step.upper = at + 1 < counts[step.owner] ? blocks[at + 1] * S::kPairBlock : -1;
      } else {
        const int at = j / 2, part = j % 2 * (S::kKeys / 2);
        step.lower = at < counts[0] ? chosen[at] * S::kKeys + part : -1;
        step.upper = at < counts[1] ? chosen[a.num_blocks + at] * S::kKeys + part : -1;
      }
    } else if (j < heavy_steps) {
      step.part = Part::kList;
      for (int steps; j >= (steps = steps_of<S::kKeys>(counts[step.owner] * a.block_size)); ++step.owner) j -= steps;
      step.lower = j * S::kKeys;
    } else {
      describe_sample(j - heavy_steps, step);
    }
  }
  HA_DEVICE void describe_sample(int j, Step& step) const {
    step.part = Part::kSample;
    step.owner = sampled_local + j / sample_list_steps;
    step.lower = j % sample_list_steps * S::kKeys;
  }

  HA_DEVICE Mode mode(const Step& step, int w) const {
    const int from = warp_first[w], to = warp_last[w];
    if (from > to) return Mode::kSkip;
    if (step.part == Part::kSample || (S::kOwnedPairs && step.part == Part::kList)) return Mode::kBiased;
    if (step.part == Part::kList) {
      const int start = (first_query_block + step.owner) * a.block_size;
      return to >= start && from < start + a.block_size ? Mode::kBiased : Mode::kSkip;
    }
    // Both bounds grow with the position.
    const bool pair = step.part == Part::kPair;
    if constexpr (S::kOwnedPairs) {
      if (pair && w != step.owner) return Mode::kSkip;
      const Bounds low = bounds_at(step.part, from, far(from)), high = bounds_at(step.part, to, far(to));
      const bool all = min(step.lower, step.upper) >= high.low && max(step.lower, step.upper) + S::kKeys / 2 <= low.high;
      return all ? Mode::kPlain : Mode::kMasked;
    }
    const int start = pair && w >= S::kWarps / 2 ? step.upper : step.lower, stop = start + (pair ? S::kKeys / 2 : S::kKeys);
    const Bounds low = bounds_at(step.part, from, far(from)), high = bounds_at(step.part, to, far(to));
    if (start < 0 || start >= high.high || stop <= low.low) return Mode::kSkip;
    return start >= high.low && stop <= low.high ? Mode::kPlain : Mode::kMasked;
  }

  // Entry `slot` of a kList or kSample step.
  HA_DEVICE Entry find_entry(const Step& step, int slot) const {
    const int at = step.lower + slot;
    if (step.part == Part::kList) {
      if (at >= counts[step.owner] * a.block_size) return {-1, at, 1.0f};
      const int key = chosen[step.owner * a.num_blocks + at / a.block_size] * a.block_size + at % a.block_size;
      const int limit = min(far((first_query_block + step.owner) * a.block_size), length);
      return {key < a.sinks || key >= limit ? -1 : key, at, 1.0f};
    }
    if (at >= a.sample_size) return {-1, at, 1.0f};
    const Sample sample = draw_sample(a, sample_candidates(step.owner), at, head, a.causal ? int64_t(step.owner) * a.local_size : 0);
    return {int(sample.key), at, sample.weight};
  }

  // Writes its key and its bias for query blocks q0, q0 + stride, ... (-inf = masked), in units of logits before `factor` turns them
  // into base 2.
  HA_DEVICE void write_entry(const Step& step, const Entry& entry, int slot, int q0, int stride, float factor, int32_t* keys,
                             float* bias) const {
    if (q0 == 0) keys[slot] = entry.key;
    const float value = log2f(entry.weight) / factor;
    for (int q = q0; q < query_blocks; q += stride) {
      bool visible = entry.key >= 0;
      if (step.part == Part::kList) {
        visible = visible && q == step.owner;
      } else {
        const int start = (first_query_block + q) * a.block_size - step.owner * a.local_size;  // in the samples' local block
        visible = visible && (!a.causal || (start >= 0 && start < a.local_size));
        bool taken = false;  // all blocks are looked at: several are on their way at once
#pragma unroll 8
        for (int i = 0; i < counts[q]; ++i)
          taken |= uint32_t(entry.key - chosen[q * a.num_blocks + i] * a.block_size) < uint32_t(a.block_size);
        visible = visible && !taken;
      }
      bias[q * S::kKeys + slot] = visible ? value : -INFINITY;
    }
  }
};

}  // namespace ha
