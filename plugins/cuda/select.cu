// The selector `blocks` (rules 17 to 23): int8 products of quantised pools on the tensor cores, fused with the maximum, and
// the best key blocks of each query block. Scores live in shared memory only.
#include "best.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kWarps = kSelectThreads / 32;
constexpr int kPoolRows = 16, kPoolColumns = 8;  // query and key pools of one tensor-core product

// 2^23 + 2^22 as an int32 accumulator's start: the sum's bits are then a float that is exact for |dot| < 2^22, and
// 127 * 127 * 256 lies below. A subtraction is cheaper than a conversion.
constexpr int32_t kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// Key pools `first`.. of one head as B operand. Lane 4 g + t holds bytes 16 t.. of each 64 bytes of pool g: A and B
// permute the products' inner index alike, which the sum does not see, and every load is 16 bytes.
// D is the pools' stride: the head size, filled up with zeros.
template <int D>
struct Fragment {
  uint32_t w[D / 16];

  HA_DEVICE void load(const int8_t* pool, int lane) {
#pragma unroll
    for (int part = 0; part < D / 64; ++part) {
      const Words4 x = load16(pool + part * 64 + lane % 4 * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[part * 4 + i] = x.w[i];
    }
  }
  HA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) w[i] = 0;
  }
};

// One tensor's pools of one batch row and head.
struct PoolView {
  const int8_t* values;
  const float* scales;
  int count;

  HA_DEVICE PoolView(const Pools& pools, int64_t slice)
      : values(pools.values + slice * pools.count * pools.stride), scales(pools.scales + slice * pools.count), count(int(pools.count)) {}
};

// Up to 16 query pools as A operand: pool `first` + row; those at or past `stop` or not there are skipped (factor NaN).
template <int D>
struct QueryTile {
  Fragment<D> upper, lower;  // rows lane / 4 and lane / 4 + 8
  float factor[2];

  HA_DEVICE void load(const PoolView& q, int first, int stop, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pool = first + lane / 4 + half * 8;
      const bool inside = pool >= 0 && pool < min(stop, q.count);
      Fragment<D>& fragment = half ? lower : upper;
      if (inside) fragment.load(q.values + int64_t(pool) * D, lane);
      else fragment.clear();
      factor[half] = inside ? load_once(q.scales + pool) : NAN;
    }
  }

  // best[half][column] = float(q8 . k8) r for rows lane / 4 + 8 half and columns 2 (lane % 4) + column.
  HA_DEVICE void multiply(const Fragment<D>& keys, float (&best)[2][2]) const {
    int32_t c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
    for (int step = 0; step < D / 32; ++step) {
      const uint32_t a[4] = {upper.w[2 * step], lower.w[2 * step], upper.w[2 * step + 1], lower.w[2 * step + 1]};
      multiply_add_int8(c, a, keys.w[2 * step], keys.w[2 * step + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i / 2][i % 2] = mul_rn(add_rn(bits_float(uint32_t(c[i])), -kMagic), factor[i / 2]);
  }
};

// Candidates of one query block. One thread fills it in; it lies in shared memory.
struct Block {
  int start, stop;              // candidate key blocks
  int super_start, super_stop;  // superblocks that hold them; empty where all candidates are scored (rule 23)
  int kept, shift;              // superblocks kept; key blocks a superblock = 1 << shift
  bool present;                 // holds a query row

  HA_DEVICE void fill(const Geometry& g, int64_t block, int64_t length) {
    *this = Block{};
    const Range tiles = g.query_blocks();
    present = block >= tiles.start && block < tiles.stop;
    if (!present) return;
    const Range candidates = g.candidates(block * g.a.block_size, length);
    start = int(candidates.start);
    stop = start + int(candidates.size());
    if (start == stop || !g.uses_superblocks(candidates)) return;
    const Range supers = g.superblocks(candidates);
    super_start = int(supers.start);
    super_stop = int(supers.stop);
    kept = int(Geometry::kept_superblocks(supers.size()));
    while (g.a.block_size << shift < kSuperblock) ++shift;
  }
  HA_DEVICE bool two_levels() const { return kept > 0; }
  HA_DEVICE int entries() const { return two_levels() ? kept << shift : stop - start; }
  // Key block of entry e, ascending in e; `list` = this block's kept superblocks.
  HA_DEVICE int key_block(const int32_t* list, int e) const {
    return two_levels() ? (list[e >> shift] << shift) + (e & ((1 << shift) - 1)) : start + e;
  }
};
static_assert(sizeof(Block) * kSelectMostBlocks <= kSelectBlockBytes);

// Rule 23's first level for all query blocks of the group at once: their coarse pools are the rows of one product.
template <int D>
HA_DEVICE void score_supers(const SelectArgs& args, const Block* infos, const PoolView& q, const PoolView& k, int first,
                            uint32_t* scores, int warp, int lane) {
  const int rows = args.p.attributes.block_size / kCoarsePool, blocks = args.config.blocks;  // coarse pools a query block
  QueryTile<D> query;
  query.load(q, first, first + blocks * rows, lane);
  // For the block of rows lane / 4 and lane / 4 + 8: its superblocks, the key pools that take part, where scores go.
  int begin[2] = {0, 0}, end[2] = {0, 0}, pools[2] = {0, 0};
  int start = INT32_MAX, stop = 0;  // superblocks of any block in the group
  for (int i = 0; i < blocks; ++i) {
    const Block& block = infos[i];
    if (!block.two_levels()) continue;
    start = min(start, block.super_start);
    stop = max(stop, block.super_stop);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if ((lane / 4 + half * 8) / rows != i) continue;
      begin[half] = block.super_start;
      end[half] = block.super_stop;
      pools[half] = min(block.stop * rows, k.count);
    }
  }
  if (start >= stop) return;  // no query block of this group has two levels
  constexpr int kTiles = kSuperblock / kCoarsePool / kPoolColumns;
  const int last = k.count - 1;
  for (int super = start + warp; super < stop; super += kWarps) {
    Fragment<D> keys[kTiles];
    float scale[kTiles][2];
    const int pool0 = super * (kSuperblock / kCoarsePool);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int pool = pool0 + n * kPoolColumns;
      keys[n].load(k.values + int64_t(min(pool + lane / 4, last)) * D, lane);
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[n][e] = load_once(k.scales + min(pool + lane % 4 * 2 + e, last));
    }
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float product[2][2];
      query.multiply(keys[n], product);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, e = i % 2;
        // fmaxf drops NaN, the mark of a skipped pool; a_k > 0 lets the two maxima of rule 20 be taken in any order.
        if (pool0 + n * kPoolColumns + lane % 4 * 2 + e < pools[half])
          best[half] = fmaxf(best[half], mul_rn(product[half][e], scale[n][e]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[half] = fmaxf(best[half], shuffle_xor(best[half], 1));
      best[half] = fmaxf(best[half], shuffle_xor(best[half], 2));
      for (int mask = 4; mask < rows * 4 && mask < 32; mask *= 2) best[half] = fmaxf(best[half], shuffle_xor(best[half], mask));
    }
    if (rows == kPoolRows) best[0] = best[1] = fmaxf(best[0], best[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (lane % 4 == 0 && row % rows == 0 && super >= begin[half] && super < end[half])
        scores[row / rows * args.config.supers + super - begin[half]] = ordered(best[half]);
    }
  }
}

// Scores of the candidate key blocks of one query block. A warp scores one key block at a time.
template <int D>
HA_DEVICE void score_blocks(const PoolView& q, const PoolView& k, const Block& block, const int32_t* list, int first, int per_block,
                            uint32_t* scores, int part, int parts, int lane) {
  const int row_tiles = (per_block + kPoolRows - 1) / kPoolRows;
  QueryTile<D> query;
  query.load(q, first, first + per_block, lane);
  const int entries = block.entries(), start = block.start, stop = block.stop;
  for (int e = part; e < entries; e += parts) {
    const int key_block = block.key_block(list, e);
    if (key_block < start || key_block >= stop) {
      if (lane == 0) scores[e] = 0;  // part of a kept superblock, no candidate
      continue;
    }
    const int pool0 = key_block * per_block, pool1 = min(pool0 + per_block, k.count);
    float best = -INFINITY;
    for (int pool = pool0; pool < pool1; pool += 2 * kPoolColumns) {
      Fragment<D> keys[2];
      float scale[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = pool + n * kPoolColumns;
        keys[n].load(k.values + int64_t(min(column + lane / 4, pool1 - 1)) * D, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = column + lane % 4 * 2 + i;
          scale[n][i] = at < pool1 ? load_once(k.scales + at) : NAN;
        }
      }
      for (int tile = 0; tile < row_tiles; ++tile) {
        if (row_tiles > 1) query.load(q, first + tile * kPoolRows, first + per_block, lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float product[2][2];
          query.multiply(keys[n], product);
#pragma unroll
          for (int i = 0; i < 2; ++i) best = fmaxf(best, mul_rn(fmaxf(product[0][i], product[1][i]), scale[n][i]));
        }
      }
    }
    const uint32_t word = warp_max(ordered(best));
    if (lane == 0) scores[e] = word;
  }
}

template <int D>
HA_KERNEL(kSelectThreads, D == 64 ? 6 : D == 128 ? 5 : 4) select_kernel(const HA_CONSTANT SelectArgs args) {
  const Geometry g(args.p);
  const SelectConfig& config = args.config;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  // The last group has the most candidates: first.
  const int64_t group = config.first + config.groups - 1 - block_index() % config.groups;
  const int64_t slice = block_index() / config.groups, batch = slice / g.heads_q;
  const int64_t kv_slice = batch * g.heads_kv + slice % g.heads_q / g.group();

  Block* const infos = reinterpret_cast<Block*>(shared_memory());
  uint32_t* const super_scores = reinterpret_cast<uint32_t*>(shared_memory() + kSelectBlockBytes);
  uint32_t* const block_scores = super_scores + config.blocks * config.supers;
  int32_t* const kept = reinterpret_cast<int32_t*>(block_scores + config.blocks * config.entries);
  if (thread_index() < config.blocks)
    infos[thread_index()].fill(g, group * config.blocks + thread_index(), g.length(args.p.lengths, batch));
  sync_block();

  const int parts = kWarps / config.blocks, mine = warp / parts, part = warp % parts;  // warps a query block
  const int64_t query_block = group * config.blocks + mine;
  const Block& block = infos[mine];
  int32_t* const list = kept + mine * config.kept;

  if (config.supers) {
    const PoolView q(args.q_coarse, slice), k(args.k_coarse, kv_slice);
    const int64_t first = group * config.blocks * (g.a.block_size / kCoarsePool) - floor_div(g.first(), kCoarsePool);
    score_supers<D>(args, infos, q, k, int(first), super_scores, warp, lane);
    sync_block();
    if (block.two_levels() && part == 0)
      keep_best(super_scores + mine * config.supers, block.super_stop - block.super_start, block.kept, lane,
                [&](int rank, int index) { list[rank] = block.super_start + index; });
    sync_block();
  }
  uint32_t* const scores = block_scores + mine * config.entries;
  if (block.present) {
    const PoolView q(args.q_fine, slice), k(args.k_fine, kv_slice);
    const int per_block = g.a.block_size / g.a.pool_size;
    const int64_t first = query_block * per_block - floor_div(g.first(), g.a.pool_size);
    score_blocks<D>(q, k, block, list, int(first), per_block, scores, part, parts, lane);
  }
  sync_block();
  if (!block.present || part) return;
  const Range tiles = g.query_blocks();
  const int entries = block.entries();
  const int count = min(g.a.num_blocks, count_at_least(scores, entries, 1, lane));
  int32_t* const out = args.plan + (slice * tiles.size() + query_block - tiles.start) * g.a.num_blocks;
  for (int i = count + lane; i < g.a.num_blocks; i += 32) out[i] = -1;
  if (count) keep_best(scores, entries, count, lane, [&](int rank, int e) { out[rank] = block.key_block(list, e); });
}

template <int D>
void launch_instance(const SelectArgs& args) {
  const Geometry g(args.p);
  launch<select_kernel<D>>(g.batch * g.heads_q * args.config.groups, kSelectThreads, size_t(args.config.bytes), args.p.stream, args);
}

}  // namespace

void launch_select(const SelectArgs& args) {
#define HA_CASE(D) \
  if (args.q_fine.stride == D) return launch_instance<D>(args);
  HA_POOL_STRIDES(HA_CASE)
#undef HA_CASE
}

}  // namespace ha
