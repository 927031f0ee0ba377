// What sm90_config.h decides before a launch, for tests: which problems the Hopper kernels take, their shared memory, the order of tiles.
#include <vector>

#include "sm90_config.h"

#define HA_TEST extern "C" __attribute__((visibility("default")))

// Whether they take the problem on a device of this compute capability.
HA_TEST int ha_emulated_uses_hopper(const HaParams* p, int capability) { return ha::uses_hopper(ha::Geometry(*p), p->dtype, capability); }

// The most bytes of shared memory that one of its launches asks for.
HA_TEST int ha_emulated_hopper_bytes(const HaParams* p) {
  const ha::Geometry g(*p);
  const int padded = ha::hopper_head(ha::max64(g.head_dim, g.head_dim_v));
  const bool runs = ha::meets_runs(g) || ha::splits_blocks(g);
  int most = (runs ? ha::hopper_runs_config(g, padded) : ha::hopper_position_config(g, padded)).shared.bytes;
  if (ha::splits_blocks(g)) most = int(ha::max64(most, ha::hopper_pair_config(g, padded).shared.bytes));
  if (ha::has_nodes(g))
    for (int level = 0; level < g.levels(); ++level) most = int(ha::max64(most, ha::hopper_node_config(g, padded, level).shared.bytes));
  return most;
}

// Whether attention takes one launch for what the plan of `blocks` names and another for local part and sinks.
HA_TEST int ha_emulated_splits(const HaParams* p) { return ha::splits_blocks(ha::Geometry(*p)); }

// What is wrong with the tiles of the first of these launches: 0 = nothing, 1 = a row that sees other keys than its local part and sinks
// lies in none of them or in two, 2 = a tile without such a row.
HA_TEST int ha_emulated_pair_tiles_mistake(const HaParams* p) {
  const ha::Geometry g(*p);
  const int padded = ha::hopper_head(ha::max64(g.head_dim, g.head_dim_v));
  const ha::HopperConfig config = ha::hopper_pair_config(g, padded);
  const int64_t rows = ha::pair_table(padded).rows();
  if (config.schedule.count != config.attend.tiles * g.batch * g.heads_q) return 1;
  std::vector<int> needed(size_t(config.attend.tiles));
  for (int64_t position = ha::max64(g.first(), 0); position < g.first() + g.seq_q; ++position) {
    if (g.far(position, g.seq_k) <= g.a.sinks) continue;
    const int64_t tile = position / rows - config.attend.first_tile;
    if (tile < 0 || tile >= config.attend.tiles) return 1;
    needed[size_t(tile)] = 1;
  }
  for (const int seen : needed)
    if (!seen) return 2;
  return 0;
}

// What is wrong with the order of tiles on so many processors: 0 = nothing, 1 = a tile left out or taken twice, 2 = a block of threads
// meets tiles out of turn, 3 = query heads of one key head apart, 4 = more heads together than the cache holds, or far fewer, 5 = shares of
// tiles of nodes that do not follow each other or differ by more than one.
HA_TEST int ha_emulated_schedule_mistake(const HaParams* p, int64_t tiles, int64_t processors, int64_t cache_bytes, int steady) {
  const ha::Geometry g(*p);
  const ha::HopperSchedule s = ha::hopper_schedule(g, tiles, steady != 0, cache_bytes);
  const int64_t heads = s.together / g.group(), bytes = g.seq_k * (g.head_dim + g.head_dim_v) * 2, fit = cache_bytes / bytes;
  if (heads > ha::max64(fit, 1) || 2 * heads < ha::min64(fit, g.batch * g.heads_kv)) return 4;
  const int64_t blocks = ha::min64(s.count, processors);
  std::vector<int> seen(size_t(g.batch * g.heads_q * tiles));
  if (s.count != int64_t(seen.size())) return 1;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t turn = 0; turn * blocks < s.count; ++turn) {
      const int64_t index = s.at(block, blocks, turn);
      if (index < turn * blocks || index >= (turn + 1) * blocks || (index - turn * blocks == block) != (turn % 2 == 0 || 2 * block == blocks - 1))
        return 2;
      if (index >= s.count) break;
      int64_t slice = -1, tile = -1;
      s.find(index, slice, tile);
      if (slice < 0 || slice >= g.batch * g.heads_q || tile < 0 || tile >= tiles || seen[size_t(slice * tiles + tile)]++) return 1;
      // All tiles of the heads that share keys lie in one run.
      const int64_t kv = slice / g.group();
      if (index / (s.together * tiles) != kv * g.group() / s.together) return 3;
    }
  if (s.share(0, blocks) != 0 || s.share(blocks, blocks) != s.count) return 5;
  for (int64_t block = 0; block < blocks; ++block)
    if (const int64_t more = s.share(block + 1, blocks) - s.share(block, blocks) - s.count / blocks; more < 0 || more > 1) return 5;
  for (const int times : seen)
    if (times != 1) return 1;
  return 0;
}
