// The walk of a node's tiles where a warp group takes several pieces of a tile's rows: what planning threads do for each row and key is
// cheaper than in NodeWalk, and loading and computing threads find the tile's slice here.
#pragma once
#include "walk_nodes.cuh"

namespace ha {

template <class S>
struct TallNodeWalk : NodeWalk<S> {
  using Base = NodeWalk<S>;
  static_assert(S::kOwnedPairs);

  int64_t slice;
  int level;

  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch, int64_t head) {
    Base::start(p, config, g, tile, batch, head);
    level = config.level;
  }

  HA_DEVICE Row row(const Geometry& g, int at) const {
    const int slot = this->first + at;
    int index = -1;
    if (slot <= this->last) index = this->empty ? this->row_start + slot : this->rows[slot];
    if (index < this->row_start || index >= this->row_stop) return {0, 0, -1, 0};
    const int position = this->row0 + index, far = this->far_masked ? int(g.far(position, this->length)) : 0;
    const int query_block = this->query_blocks == 1 ? 0 : slot / this->a.block_size - this->first_query_block;
    return {far, query_block, index, met_before(position)};
  }

  // Whether the row at `position` met a node that has keys in an earlier launch: Geometry::levels_of, up to the first.
  HA_DEVICE bool met_before(int position) const {
    const HaAttributes& a = this->a;
    const int local_block = position < 0 ? 0 : position / a.local_size, from = min(a.sinks, this->length);
    for (int at = a.local_overlap; at < level && local_block >> at; ++at) {
      const int stop = (local_block >> at << at) * a.local_size;
      if ((local_block >> at & 1) && min(stop, this->length) > max(stop - (a.local_size << at), from)) return true;
    }
    return false;
  }

  // A full list of a tile's only query block is seen whole by every row, and weighs nothing. Where a plan of another problem names no key
  // of the node, its zeros count here and are masked in NodeWalk: attention.h promises nothing of such output.
  HA_DEVICE Mode mode(const Step& step, int w) const {
    if (this->first + w * S::kWarpRows > this->last) return Mode::kSkip;
    const bool only = step.part == Part::kList && this->query_blocks == 1 && !this->far_masked;
    return only && step.lower + S::kKeys <= this->counts[0] ? Mode::kPlain : Mode::kBiased;
  }

  // As in NodeWalk; the keys of a tile's only query block weigh nothing.
  HA_DEVICE void write_entry(const Step& step, const Entry& entry, int slot, int q0, int stride, float factor, int32_t* list,
                             float* bias) const {
    if (step.part == Part::kSample || this->query_blocks > 1) return Base::write_entry(step, entry, slot, q0, stride, factor, list, bias);
    list[slot] = entry.key;
    bias[slot] = entry.key >= 0 ? 0.0f : -INFINITY;
  }
};

}  // namespace ha
