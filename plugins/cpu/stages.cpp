// Each stage goes to the selector that the attributes name.
#include "selectors.h"

namespace ha::cpu {

size_t workspace_size(const Geometry& g) { return g.sorts() ? SortMemory(g, nullptr).bytes : blocks_workspace_size(g); }

void select(const HaParams& params, int32_t* plan, Workers& workers) {
  const Geometry g(params);
  if (g.plan_size() > 0) (g.sorts() ? select_sortlsh : select_blocks)(params, plan, workers);
}

void samples(const HaParams& params, int32_t* index, float* weight) {
  const Geometry g(params);
  const auto draw = [&](int64_t head, int64_t total, int64_t start) {
    for (int64_t s = 0; s < g.a.sample_size; ++s) {
      const Sample sample = g.sorts() ? draw_index(g.a, total, s, head, start) : draw_sample(g.a, total, s, head, start);
      *index++ = int32_t(sample.key);
      *weight++ = sample.weight;
    }
  };
  for (int64_t line = 0; line < g.batch * g.heads_q; ++line) {
    const int64_t head = line % g.heads_q, length = g.length(params.lengths, line / g.heads_q);
    if (!g.sorts()) {
      const Range tiles = g.local_blocks();
      for (int64_t tile = tiles.start; tile < tiles.stop; ++tile) draw(head, g.residual_candidates(tile, length), g.draw_start(tile));
      continue;
    }
    for (int level = 0; level < g.levels(); ++level) {
      const Range nodes = g.nodes_of_level(level);
      for (int64_t m = nodes.start; m < nodes.stop; ++m) {
        const Node node = g.node(level, m, length);
        draw(head, node.keys.size(), node.start);
      }
    }
  }
}

void attend(const HaParams& params, const int32_t* plan, Workers& workers) {
  const Geometry g(params);
  if (g.batch == 0 || g.seq_q == 0) return;
  if (g.exact()) return attend_exact(params, g, workers);
  (g.sorts() ? attend_sortlsh : attend_blocks)(params, g, plan, workers);
}

void forward(const HaParams& params, Workers& workers) {
  const int32_t* plan = params.plan;
  const Geometry g(params);
  if (!plan && g.plan_size() > 0) {
    int32_t* own = g.sorts() ? SortMemory(g, params.workspace).plan : blocks_plan(g, params.workspace);
    select(params, own, workers);
    plan = own;
  }
  attend(params, plan, workers);
}

}  // namespace ha::cpu
