// What the stages do for each selector, and how it divides the workspace.
#pragma once
#include "cpu.h"

namespace ha::cpu {

void attend_exact(const HaParams& params, const Geometry& g, Workers& workers);

// --- `blocks` ---

size_t blocks_workspace_size(const Geometry& g);
// Where `forward` keeps its plan; null where the plan is empty.
int32_t* blocks_plan(const Geometry& g, void* workspace);
void select_blocks(const HaParams& params, int32_t* blocks, Workers& workers);
void attend_blocks(const HaParams& params, const Geometry& g, const int32_t* blocks, Workers& workers);

// --- `sortlsh` ---

struct SortMemory {
  uint16_t* query_ranks = nullptr;  // [batch * heads_q][seq_q]
  uint16_t* key_ranks = nullptr;    // [batch * heads_kv][seq_k]
  // What each row [batch * heads_q][seq_q] has met so far, with its sums in the output: the base-2 logarithm that they are
  // relative to, and the sum of its probabilities, 0 for a row that met nothing.
  float* references = nullptr;
  float* totals = nullptr;
  int32_t* plan = nullptr;
  size_t bytes = 0;

  SortMemory(const Geometry& g, void* workspace);  // of a null pointer: the size alone
};

void select_sortlsh(const HaParams& params, int32_t* plan, Workers& workers);
void attend_sortlsh(const HaParams& params, const Geometry& g, const int32_t* plan, Workers& workers);

}  // namespace ha::cpu
