// The residual's draw written out (rules 13 to 15), for tests; attention draws the same samples inside its own kernel.
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kSampleThreads = 256;

HA_KERNEL(kSampleThreads, 2) sample_kernel(const HA_CONSTANT SampleArgs args) {
  const Geometry g(args.p);
  const Range tiles = g.local_blocks();
  const int64_t at = block_index() * kSampleThreads + thread_index();
  if (at >= g.batch * g.heads_q * tiles.size() * g.a.sample_size) return;
  const int64_t s = at % g.a.sample_size, row = at / g.a.sample_size;
  const int64_t tile = tiles.start + row % tiles.size(), slice = row / tiles.size();
  const int64_t total = g.residual_candidates(tile, g.length(args.p.lengths, slice / g.heads_q));
  const Sample sample = draw_sample(g.a, total, s, slice % g.heads_q, g.draw_start(tile));
  args.index[at] = int32_t(sample.key);
  args.weight[at] = sample.weight;
}

}  // namespace

void launch_samples(const SampleArgs& args) {
  const Geometry g(args.p);
  const int64_t count = g.batch * g.heads_q * g.local_blocks().size() * g.a.sample_size;
  launch<sample_kernel>(ceil_div(count, kSampleThreads), kSampleThreads, 0, args.p.stream, args);
}

}  // namespace ha
