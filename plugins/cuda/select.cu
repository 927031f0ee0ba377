// The selector `blocks` (rules 17 to 23): int8 products of quantised pools on the tensor cores, fused with the maximum, and
// the best key blocks of each query block. Scores live in shared memory only.
//
// A block of threads takes up to 32 neighbouring query blocks, so that each key pool is read once for all of them.
#include "launch.cuh"
#include "select_scores.cuh"

namespace ha {
namespace {

// Units of query block i that are scored: the best by their superblocks' `scores`, or all.
HA_DEVICE void keep_units(const SelectConfig& c, const Shared& shared, int i, const uint32_t* scores, int lane) {
  const SelectBlock& block = shared.blocks[i];
  uint32_t* const masks = shared.masks + i * c.words;
  uint16_t *const before = shared.before + i * c.words, *const kept = shared.kept + i * c.kept;
  if (block.kept) {
    visit_best(scores, block.units, block.kept, lane, [&](int base, uint32_t taken, int rank) {
      if (lane == 0) masks[base / 32] = taken, before[base / 32] = uint16_t(rank);
      if (taken >> lane & 1) kept[rank + count_bits(taken & ((1u << lane) - 1))] = uint16_t(base + lane);
    });
  }
  for (int word = (block.kept ? (block.units + 31) / 32 : 0) + lane; word < c.words; word += 32) {
    const int left = block.kept ? 0 : block.units - word * 32;
    masks[word] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    if (c.supers) before[word] = uint16_t(word * 32);
  }
}

// Writes the best key blocks of query block i, or, where a pass is still to come, keeps them with their scores.
HA_DEVICE void take_best(const SelectConfig& c, const Shared& shared, int i, int rank0, int num_blocks, int32_t* out, int lane) {
  const SelectBlock& block = shared.blocks[i];
  const int carried = int(c.carried), ranks = max(0, min((block.kept ? block.kept : block.units) - rank0, int(c.window)));
  const int entries = carried + (ranks << c.shift);
  uint32_t* const scores = shared.area + i * c.row;
  int32_t* const names = shared.carried + i * carried;
  const int count = visit_best(scores, entries, num_blocks, lane, [&](int base, uint32_t taken, int rank) {
    const bool take = taken >> lane & 1;
    const int e = base + lane, at = rank + count_bits(taken & ((1u << lane) - 1));
    int name = 0;
    if (take && e < carried) name = names[e];
    if (take && e >= carried) {
      const int own = rank0 + ((e - carried) >> c.shift), unit = block.kept ? shared.kept[i * c.kept + own] : own;
      name = ((int(c.first_unit) + unit) << c.shift) + ((e - carried) & ((1 << c.shift) - 1));
    }
    if (out) {
      if (take) out[at] = name;
    } else {
      const uint32_t score = take ? scores[e] : 0;
      sync_warp();  // what is written lies below base + 32
      if (take) names[at] = name, scores[at] = score;
      sync_warp();
    }
  });
  if (out) {
    for (int e = count + lane; e < num_blocks; e += 32) out[e] = -1;
  } else {
    sync_warp();
    for (int e = count + lane; e < c.row; e += 32) scores[e] = 0;
  }
}

template <int D>
HA_KERNEL(select_threads(D), 1) select_kernel(const HA_CONSTANT SelectArgs args) {
  const Geometry g(args.p);
  const SelectConfig& c = args.config;
  const int warp = thread_index() / 32, warps = c.threads / 32, lane = thread_index() % 32;
  int64_t slice, behind;
  c.order.find(block_index(), slice, behind);
  const int64_t block0 = (c.first + c.groups - 1 - behind) * c.blocks, batch = slice / g.heads_q;
  const int64_t kv_slice = batch * g.heads_kv + slice % g.heads_q / g.group();
  const int per_block = g.a.block_size / g.a.pool_size;
  const PoolView q(args.q_fine, slice), k(args.k_fine, kv_slice), q_coarse(args.q_coarse, slice), k_coarse(args.k_coarse, kv_slice);
  const int first = int(g.scoring_pools(block0, g.a.pool_size) - g.query_pools(g.a.pool_size).start);
  const int first_coarse = int(g.scoring_pools(block0, kCoarsePool) - g.query_pools(kCoarsePool).start);

  const Shared shared(c, D);
  if (thread_index() < c.blocks) shared.blocks[thread_index()] = find_block(g, c, block0 + thread_index(), g.length(args.p.lengths, batch));
  const int round = c.blocks / c.rounds;
  for (int i0 = 0; i0 < c.blocks; i0 += round) {
    if (c.supers) {
      load_queries<D>(shared.queries_coarse, shared.coarse, q_coarse, int(c.columns), c.threads, thread_index(), [&](int column) {
        const int i = column / c.spread;
        return i < round ? first_coarse + (i0 + i) * c.coarse + (column & (c.coarse - 1)) : -1;
      });
      copy_commit();
      copy_wait<0>();
      sync_block();
      SuperScores<D>{c, shared, i0, round, {}}.run(k_coarse, warp, warps, lane);
    }
    sync_block();
    for (int i = warp; i < round; i += warps) keep_units(c, shared, i0 + i, shared.supers + i * c.stride, lane);
    sync_block();
  }

  for (int i = warp; i < c.blocks; i += warps) {
    load_queries<D>(shared.queries + i * c.fine * D, shared.fine + i * c.fine / 2, q, c.fine, 32, lane,
                    [&](int column) { return column < per_block ? first + i * per_block + column : -1; });
  }
  copy_commit();
  for (int i = thread_index(); i < c.blocks * c.row; i += c.threads) shared.area[i] = 0;
  if (thread_index() == 0) *shared.next = 0;
  copy_wait<0>();
  const Range tiles = g.query_blocks();
  for (int pass = 0; pass < c.passes; ++pass) {
    const int rank0 = pass * int(c.window);
    sync_block();
    UnitScores<D>{c, shared, {}}.run(k, per_block, rank0, lane);
    sync_block();
    for (int i = warp; i < c.blocks; i += warps) {
      if (block0 + i < tiles.start || block0 + i >= tiles.stop) continue;
      int32_t* const out = args.plan + (slice * tiles.size() + block0 + i - tiles.start) * g.a.num_blocks;
      take_best(c, shared, i, rank0, g.a.num_blocks, pass + 1 < c.passes ? nullptr : out, lane);
    }
    if (thread_index() == 0) *shared.next = 0;
  }
}

template <int D>
void launch_instance(const SelectArgs& args) {
  const Geometry g(args.p);
  launch<select_kernel<D>>(g.batch * g.heads_q * args.config.groups, args.config.threads, size_t(args.config.bytes), args.p.stream, args);
}

}  // namespace

void launch_select(const SelectArgs& args) {
#define HA_CASE(D) \
  if (args.q_fine.stride == D) return launch_instance<D>(args);
  HA_POOL_STRIDES(HA_CASE)
#undef HA_CASE
}

}  // namespace ha
