// The residual's draw written out (rules 13 to 15), for tests; attention draws the same samples inside its own kernels.
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kSampleThreads = 256;

// Sample s of draw `n` of a head.
HA_DEVICE Sample draw(const Geometry& g, int64_t n, int64_t s, int64_t head, int64_t length) {
  if (!g.sorts()) {
    const int64_t tile = g.local_blocks().start + n;
    return draw_sample(g.a, g.residual_candidates(tile, length), s, head, g.draw_start(tile));
  }
  int level = 0;
  for (; n >= g.nodes_of_level(level).size(); ++level) n -= g.nodes_of_level(level).size();
  const Node node = g.node(level, g.nodes_of_level(level).start + n, length);
  return draw_index(g.a, node.keys.size(), s, head, node.start);
}

HA_KERNEL(kSampleThreads, 2) sample_kernel(const HA_CONSTANT SampleArgs args) {
  const Geometry g(args.p);
  const int64_t at = block_index() * kSampleThreads + thread_index(), draws = g.draws();
  if (at >= g.batch * g.heads_q * draws * g.a.sample_size) return;
  const int64_t s = at % g.a.sample_size, row = at / g.a.sample_size, slice = row / draws;
  const Sample sample = draw(g, row % draws, s, slice % g.heads_q, g.length(args.p.lengths, slice / g.heads_q));
  args.index[at] = int32_t(sample.key);
  args.weight[at] = sample.weight;
}

}  // namespace

void launch_samples(const SampleArgs& args) {
  const Geometry g(args.p);
  const int64_t count = g.batch * g.heads_q * g.draws() * g.a.sample_size;
  launch<sample_kernel>(ceil_div(count, kSampleThreads), kSampleThreads, 0, args.p.stream, args);
}

}  // namespace ha
