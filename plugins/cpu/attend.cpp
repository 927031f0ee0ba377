// Stage 4, exact and with the selector `blocks`: every tile of query rows gathers the keys it meets (rules 6 to 19).
#include <algorithm>
#include <memory>

#include "selectors.h"
#include "tile.h"

namespace ha::cpu {
namespace {

class ExactWorker : TileWorker {
 public:
  explicit ExactWorker(const HaParams& params) : TileWorker(params) {}

  // Rows [first, last) of the list "head of the group, then query row" against all the keys they see.
  void operator()(int64_t b, int64_t head_kv, int64_t first, int64_t last) {
    begin(b, head_kv);
    int64_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t row = first; row < last; ++row) {
      const int64_t position = g_.first() + row % g_.seq_q;
      low = min64(low, position), high = max64(high, position);
      add_row((b * g_.heads_kv + head_kv) * g_.group() * g_.seq_q + row, position);
    }
    const int64_t length = g_.length(p_.lengths, b);
    g_.a.causal ? add_causal(0, low, high, length) : add_range(0, length);
    finish();
  }
};

class BlocksWorker : TileWorker {
 public:
  BlocksWorker(const HaParams& params, const int32_t* plan) : TileWorker(params), plan_(plan) {}

  // Rows of one head and one query block.
  void operator()(int64_t b, int64_t head, int64_t first, int64_t last) {
    begin(b, head / g_.group());
    for (int64_t row = first; row < last; ++row) add_row((b * g_.heads_q + head) * g_.seq_q + row, g_.first() + row);
    const HaAttributes& a = g_.a;
    const int64_t length = g_.length(p_.lengths, b), position = g_.first() + first;
    const int64_t block = floor_div(position, a.block_size);
    const int64_t far = min64(g_.far(position, length), length);
    const int32_t* chosen = plan_ + ((b * g_.heads_q + head) * g_.query_blocks().size() + block - g_.query_blocks().start) * a.num_blocks;
    add_range(0, min64(a.sinks, far));
    for (int i = 0; i < a.num_blocks; ++i) {
      if (chosen[i] < 0) continue;
      const int64_t start = int64_t{chosen[i]} * a.block_size;
      add_range(max64(start, a.sinks), min64(start + a.block_size, far));
    }
    if (a.causal) add_causal(far, position, g_.first() + last - 1, length);
    weighted([&] { add_samples(head, position, length, chosen); });
    finish();
  }

 private:
  void add_samples(int64_t head, int64_t position, int64_t length, const int32_t* chosen) {
    const HaAttributes& a = g_.a;
    const int64_t tile = g_.local_block(position), total = g_.residual_candidates(tile, length);
    for (int64_t s = 0; total > 0 && s < a.sample_size; ++s) {
      const Sample sample = draw_sample(a, total, s, head, g_.draw_start(tile));
      if (sample.key < 0) break;
      const int32_t block = int32_t(sample.key / a.block_size);
      if (std::find(chosen, chosen + a.num_blocks, block) == chosen + a.num_blocks) push(sample.key, sample.weight);
    }
  }

  const int32_t* plan_;
};

}  // namespace

void attend_exact(const HaParams& params, const Geometry& g, Workers& workers) {
  // Few rows: a tile holds those of several heads of the group, which meet the same keys.
  const bool together = g.seq_q <= kRows;
  const int64_t line = together ? g.group() * g.seq_q : g.seq_q, lines = together ? 1 : g.group();
  const int64_t tiles = ceil_div(line, kRows), heads = g.batch * g.heads_kv * lines;
  for_each_unit(workers, heads * tiles, [&] {
    return [&, worker = std::make_unique<ExactWorker>(params)](int64_t unit) {
      const int64_t tile = tiles - 1 - unit / heads, head = unit % heads;  // the longest first
      const int64_t start = head % lines * line + tile * kRows;
      const int64_t stop = min64(start + kRows, (head % lines + 1) * line);
      (*worker)(head / lines / g.heads_kv, head / lines % g.heads_kv, start, stop);
    };
  });
}

void attend_blocks(const HaParams& params, const Geometry& g, const int32_t* blocks, Workers& workers) {
  const Range span = g.query_blocks();
  const int64_t heads = g.batch * g.heads_q;
  for_each_unit(workers, heads * span.size(), [&] {
    return [&, worker = std::make_unique<BlocksWorker>(params, blocks)](int64_t unit) {
      const int64_t head = unit / span.size(), block = span.start + unit % span.size();
      const int64_t start = max64(block * g.a.block_size - g.first(), 0);
      const int64_t stop = min64((block + 1) * g.a.block_size - g.first(), g.seq_q);
      for (int64_t row = start; row < stop; row += kRows) (*worker)(head / g.heads_q, head % g.heads_q, row, min64(row + kRows, stop));
    };
  });
}

}  // namespace ha::cpu
