// What the walks over one attention tile's keys have in common: steps of consecutive or listed keys, and who sees them.
#pragma once
#include "attend_config.h"
#include "device.cuh"

namespace ha {

// The constants of one kernel instance.
template <class T, int P>
struct Shape {
  static constexpr AttendShape kShape = attend_shape(int(sizeof(T)), P);
  static constexpr int kWarps = kShape.warps, kThreads = kShape.threads(), kWarpRows = kShape.warp_rows, kTileRows = kShape.rows();
  static constexpr int kKeys = kShape.keys, kBuffers = kShape.buffers;
  static constexpr int kRowBytes = P * int(sizeof(T)), kChunks = kRowBytes / 16;
  // Whether a step may hold runs of blocks of kPairBlock keys: a half of one block of each of the tile's two query blocks, or, where
  // pairs are owned, as many blocks of one query block as fit.
  static constexpr bool kPairs = kTileRows == 2 * kKeys && sizeof(T) == 2;
  static constexpr bool kOwnedPairs = false;
  static constexpr int kPairBlock = kKeys;
};

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Turns logits into base 2.
HA_DEVICE float base2_factor(const Geometry& g) { return (g.a.scale > 0.0f ? g.a.scale : 1.0f / sqrtf(float(g.head_dim))) * kLog2E; }

enum class Part : int { kLocal, kSinks, kPair, kList, kSample };

// Whether a step's keys lie in its list.
HA_DEVICE bool is_listed(Part part) { return part == Part::kList || part == Part::kSample; }

// How a warp treats a step: no row sees a key, every row sees all, consecutive keys cut by rows, or by the list's biases.
enum class Mode : int { kSkip, kPlain, kMasked, kBiased };

// With n keys a step. kLocal, kSinks, kPair: keys lower .. + n/2 - 1 and upper .. + n/2 - 1. Owned pairs belong to query block `owner`;
// of others the first half belongs to the tile's lower rows and the other to its upper ones; -1 = none. kList and kSample: keys and biases
// lie in the step's list; `owner` is the query block or local block that the list belongs to and `lower` its first entry.
struct alignas(16) Step {
  int lower, upper, owner;
  Part part;
  Mode modes[kMostAttendWarps];  // of each warp

  HA_DEVICE bool listed() const { return is_listed(part); }
};
static_assert(sizeof(Step) == kStepBytes);

// What masks, loads and stores need to know of a query row.
struct alignas(16) Row {
  int far, query_block;  // first key that is not local; query block, counted from the tile's first
  int index;             // -1: no row
  int stored;            // whether out and lse hold what the row has seen in earlier launches
};
static_assert(sizeof(Row) == kRowInfoBytes);

// What an entry of a kList or kSample step refers to: its key (-1 = none), its place in the order that it was found in, the weight
// whose log is added to its logit.
struct Entry {
  int key, place;
  float weight;
};

struct Bounds {
  int low, high;  // a row sees keys low <= j < high
};

template <int kKeys>
HA_DEVICE int steps_of(int keys) {
  return keys > 0 ? (keys + kKeys - 1) / kKeys : 0;
}

// Fills in what the warps share of step j, and what warp `w` does in it; warp 0's caller writes the former.
template <class Walk>
HA_DEVICE void write_step(const Walk& walk, int j, int w, Step* target) {
  Step step{};
  walk.describe(j, step);
  if (w == 0) {
    target->lower = step.lower;
    target->upper = step.upper;
    target->owner = step.owner;
    target->part = step.part;
  }
  target->modes[w] = walk.mode(step, w);
}

}  // namespace ha
