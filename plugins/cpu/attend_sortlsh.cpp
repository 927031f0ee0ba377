// Stage 4 with the selector `sortlsh` (rules 24 to 29). The nodes of a level have no row in common, so each level is one run
// of the threads; a row's sums wait in the output until the next level, and at last meet its local keys and the sinks.
#include <algorithm>
#include <memory>

#include "selectors.h"
#include "tile.h"

namespace ha::cpu {
namespace {

class SortWorker : TileWorker {
 public:
  SortWorker(const HaParams& params, const int32_t* plan, const SortMemory& memory)
      : TileWorker(params), rows_(plan), keys_(plan + g_.batch * g_.heads_q * g_.levels() * g_.seq_q), m_(memory) {}

  // Query block `block` of a node: its heavy keys and samples.
  void node(int64_t b, int64_t head, int level, int64_t m, int64_t block) {
    const HaAttributes& a = g_.a;
    const int64_t length = g_.length(p_.lengths, b), head_kv = head / g_.group();
    const Node node = g_.node(level, m, length);
    if (node.empty()) return;
    const int32_t* rows = rows_ + ((b * g_.heads_q + head) * g_.levels() + level) * g_.seq_q;
    const int32_t* keys = keys_ + ((b * g_.heads_kv + head_kv) * g_.levels() + level) * g_.seq_k + node.keys.start;
    const Range taken = taken_blocks(a, block, node.live, node.keys.size());
    const Range heavy{taken.start * a.block_size, min64(taken.stop * a.block_size, node.keys.size())};
    const int64_t stop = min64(node.rows.start + (block + 1) * a.block_size, node.rows.stop);
    for (int64_t first = node.rows.start + block * a.block_size; first < stop; first += kRows) {
      begin(b, head_kv);
      int64_t far = length;  // first key that is local to some row: keys of a node may be, with overlap
      for (int64_t slot = first; slot < min64(first + kRows, stop); ++slot) {
        if (!inside(rows[slot], g_.seq_q)) continue;
        const int64_t row_far = g_.far(g_.first() + rows[slot], length);
        far = min64(far, row_far);
        add_row((b * g_.heads_q + head) * g_.seq_q + rows[slot], row_far - 1);
      }
      resume(m_.references, m_.totals);
      const auto absorb = [&] {
        for (int64_t i = heavy.start; i < heavy.stop; ++i)
          if (inside(keys[i], length)) push(keys[i]);
        weighted([&] { add_samples(head, node, keys, heavy, length); });
      };
      far < node.keys.stop ? masked(absorb) : absorb();
      suspend(m_.references, m_.totals);
    }
  }

  // Rows [first, last) of one local block: the sinks and the local keys.
  void position(int64_t b, int64_t head, int64_t first, int64_t last) {
    begin(b, head / g_.group());
    for (int64_t row = first; row < last; ++row) add_row((b * g_.heads_q + head) * g_.seq_q + row, g_.first() + row);
    resume(m_.references, m_.totals);
    const int64_t length = g_.length(p_.lengths, b), position = g_.first() + first;
    const int64_t far = min64(g_.far(position, length), length);
    add_range(0, min64(g_.a.sinks, far));
    if (g_.a.causal) add_causal(far, position, g_.first() + last - 1, length);
    finish();
  }

 private:
  // A plan that was made for other lengths may hold -1, and never leads outside the tensors.
  static bool inside(int32_t index, int64_t size) { return index >= 0 && index < size; }

  void add_samples(int64_t head, const Node& node, const int32_t* keys, Range heavy, int64_t length) {
    for (int64_t s = 0; s < g_.a.sample_size; ++s) {
      const Sample sample = draw_index(g_.a, node.keys.size(), s, head, node.start);
      if (sample.key < 0) break;
      if (sample.key >= heavy.start && sample.key < heavy.stop) continue;
      if (inside(keys[sample.key], length)) push(keys[sample.key], sample.weight);
    }
  }

  const int32_t* rows_;
  const int32_t* keys_;
  const SortMemory& m_;
};

}  // namespace

void attend_sortlsh(const HaParams& params, const Geometry& g, const int32_t* plan, Workers& workers) {
  const SortMemory memory(g, params.workspace);
  const int64_t heads = g.batch * g.heads_q;
  std::fill_n(memory.totals, heads * g.seq_q, 0.0f);
  const auto run = [&](int64_t units, auto&& body) {
    for_each_unit(workers, heads * units, [&] {
      return [&, worker = std::make_unique<SortWorker>(params, plan, memory)](int64_t unit) {
        const int64_t head = unit / units;
        body(*worker, head / g.heads_q, head % g.heads_q, unit % units);
      };
    });
  };
  for (int level = 0; level < g.levels(); ++level) {
    const Range nodes = g.nodes_of_level(level);
    const int64_t blocks = ceil_div(g.a.causal ? min64(g.segment(level), g.seq_q) : g.seq_q, g.a.block_size);
    run(nodes.size() * blocks, [&](SortWorker& worker, int64_t b, int64_t head, int64_t unit) {
      worker.node(b, head, level, nodes.start + unit / blocks, unit % blocks);
    });
  }
  // Tiles are cut at local blocks, whose rows meet the same keys.
  const int64_t size = g.a.causal ? g.a.local_size : g.seq_q, tiles = ceil_div(size, kRows);
  const Range span = g.tiles(size);
  run(span.size() * tiles, [&](SortWorker& worker, int64_t b, int64_t head, int64_t unit) {
    const int64_t start = (span.start + unit / tiles) * size - g.first(), row = start + unit % tiles * kRows;
    const int64_t first = max64(row, 0), last = min64(min64(row + kRows, start + size), g.seq_q);
    if (first < last) worker.position(b, head, first, last);
  });
}

}  // namespace ha::cpu
