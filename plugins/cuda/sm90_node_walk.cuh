// The walk of a node's tiles on Hopper, for NodePlanner: it goes on from a tile to the next of the same node, look-ups are apart from what
// follows from them, and loading and computing threads find the tile's slice here.
#pragma once
#include "walk_nodes.cuh"

namespace ha {

template <class S>
struct TallNodeWalk : NodeWalk<S> {
  using Base = NodeWalk<S>;

  int64_t slice, kv_slice;  // batch row and query head, batch row and key head
  int level;

  HA_DEVICE void start(const HaParams& p, const AttendConfig& config, const Geometry& g, int64_t tile, int64_t batch, int64_t head) {
    Base::start(p, config, g, tile, batch, head);
    level = config.level;
  }

  // The same node's tile `tile`.
  HA_DEVICE void move(const AttendConfig& config, int64_t tile) {
    this->first = int(Base::first_slot(config, tile));
    this->last = this->first + min(S::kTileRows, this->row_stop - this->row_start - this->first) - 1;
    this->first_query_block = this->first / this->a.block_size;
  }
  // As `present`.
  HA_DEVICE bool holds_rows() const { return this->first < this->row_stop - this->row_start && !(this->a.causal && this->empty); }

  // The tile's row `at`: its index as the plan has it, and what is to be known of it. A plan that names no row of the node leaves it out.
  HA_DEVICE int row_index(int at) const {
    const int slot = this->first + at;
    if (slot > this->last) return -1;
    return this->empty ? this->row_start + slot : this->rows[slot];
  }
  HA_DEVICE Row row_of(const Geometry& g, int at, int index) const {
    if (index < this->row_start || index >= this->row_stop) return {0, 0, -1, 0};
    const int position = this->row0 + index, far = this->far_masked ? int(g.far(position, this->length)) : 0;
    const int query_block = this->query_blocks == 1 ? 0 : (this->first + at) / this->a.block_size - this->first_query_block;
    return {far, query_block, index, met_before(position)};
  }

  // Sample number s: its place in the node's sorted keys (-1: none), its weight.
  HA_DEVICE Sample draw(int s) const {
    if (s >= this->a.sample_size) return {-1, 1.0f};
    return draw_index(this->a, this->key_stop - this->key_start, s, this->head, this->draw_start);
  }
  // The key at a place, as the plan has it; -1 where it is none of the node's.
  HA_DEVICE int key_at(int place) const { return place >= 0 ? this->keys[place] : -1; }
  HA_DEVICE int checked(int key) const { return key < this->key_start || key >= this->key_stop ? -1 : key; }
  // Whether query block q takes the key at a place.
  HA_DEVICE bool takes(int q, int place) const { return place >= this->chosen[2 * q] && place < this->chosen[2 * q + 1]; }

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
};

}  // namespace ha
