// What select_config.h decides before a launch, for tests.
#include "select_config.h"

// Of the selection on a GPU that grants a block of threads `shared` bytes: query blocks and threads of a block of threads, parts of either
// level, bytes.
extern "C" __attribute__((visibility("default"))) void ha_emulated_select_config(const HaParams* p, int64_t shared, int64_t (&found)[5]) {
  const ha::SelectConfig c = ha::select_config(ha::Geometry(*p), shared);
  const int64_t choice[] = {c.blocks, c.threads, c.rounds, c.passes, c.bytes};
  for (int i = 0; i < 5; ++i) found[i] = choice[i];
}
