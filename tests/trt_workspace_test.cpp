// Scratch that the plugin asks for, against what the kernels need inside the profile. The checks are listed in trt_fields_test.cpp.
#include <algorithm>
#include <random>

#include "trt_harness.h"

using namespace nvinfer1;

namespace {
// One problem of the workspace check: bfloat16, 8 query heads over 2.
struct Problem {
  const char* selector;
  int32_t causal, block_size, pool_size, local_size, num_projections, exact_below;
  int64_t head_dim;
};

size_t needed(const Problem& of, int64_t batch, int64_t seq_q, int64_t seq_k) {
  HaParams p{};
  p.struct_size = sizeof(p), p.dtype = HA_BFLOAT16, p.batch = batch, p.heads_q = 8, p.heads_kv = 2;
  p.seq_q = seq_q, p.seq_k = seq_k, p.head_dim = p.head_dim_v = of.head_dim;
  const int32_t selector = std::string(of.selector) == "sortlsh" ? HA_SORTLSH : HA_BLOCKS;
  p.attributes = {of.causal, 0, selector, of.block_size, 8, of.pool_size, 256, 1, of.local_size, 1, 64, of.exact_below, of.num_projections, 0, 0};
  size_t bytes = 0;
  expect(workspace_size(&p, &bytes) == 0, "the library takes " + std::to_string(seq_q) + " x " + std::to_string(seq_k));
  return bytes;
}

std::unique_ptr<IPluginV3> plugin_of(const Problem& of) {
  return FieldList().text("selector", of.selector).integer("causal", of.causal).integer("block_size", of.block_size)
      .integer("pool_size", of.pool_size).integer("local_size", of.local_size).integer("num_projections", of.num_projections)
      .integer("exact_below", of.exact_below).make();
}

size_t planned(IPluginV3& plugin, const Problem& of, int64_t batch, int64_t seq_q, int64_t seq_k) {
  std::vector<DynamicPluginTensorDesc> in(3), out(1);
  for (int i = 0; i < 3; ++i) {
    in[i].desc = tensor({-1, i ? 2 : 8, -1, of.head_dim});
    in[i].min = tensor({1, i ? 2 : 8, 1, of.head_dim}).dims;
    in[i].opt = in[i].max = tensor({batch, i ? 2 : 8, i ? seq_k : seq_q, of.head_dim}).dims;
  }
  expect(build(plugin)->configurePlugin(in.data(), 3, out.data(), 1) == 0, "the profile is accepted: " + recorder.text);
  return build(plugin)->getWorkspaceSize(in.data(), 3, out.data(), 1);
}

// What a problem inside the profile needs has to fit into what was planned for the largest.
void fits(size_t bytes, const Problem& of, int64_t batch, int64_t seq_q, int64_t seq_k) {
  const size_t need = needed(of, batch, seq_q, seq_k);
  expect(need <= bytes, std::string(of.selector) + ", block_size " + std::to_string(of.block_size) + ": " + std::to_string(need) +
                            " bytes at batch " + std::to_string(batch) + ", " + std::to_string(seq_q) + " x " + std::to_string(seq_k) +
                            " do not fit into " + std::to_string(bytes));
}

}  // namespace

void workspace() {
  for (const char* selector : {"blocks", "sortlsh"}) {
    const Problem of{selector, 1, 64, 4, 1024, 7, 4096, 64};
    auto plugin = plugin_of(of);
    size_t last = 0;
    for (const int64_t length : {1, 65, 4096, 4097, 20001, 131072}) {
      const size_t bytes = planned(*plugin, of, 3, length, length);
      expect(bytes >= last, "more at " + std::to_string(length) + ": " + std::to_string(bytes) + " after " + std::to_string(last));
      last = bytes;
      for (int64_t batch = 1; batch <= 3; ++batch)
        for (const int64_t seq_k : {int64_t{1}, int64_t{63}, length / 3 + 1, length / 2, length - 1, length})
          for (const int64_t seq_q : {int64_t{1}, int64_t{64}, int64_t{65}, seq_k})
            if (seq_q <= length && seq_k >= 1 && seq_k <= length) fits(bytes, of, batch, seq_q, seq_k);
    }
    expect(last > 0, "a long problem needs scratch");
    // Chunks of a longer prefill: where the rows begin moves against the tiles.
    const size_t chunk = planned(*plugin, of, 1, 256, 8192);
    for (const int64_t seq_q : {65, 193, 255, 256})
      for (int64_t seq_k = 7900; seq_k <= 8192; ++seq_k) fits(chunk, of, 1, seq_q, seq_k);
  }
}

// Random profiles and problems inside them, either selector.
void random_workspace() {
  std::mt19937 random(20);
  const auto draw = [&random](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  for (int profile = 0; profile < 400; ++profile) {
    const auto block = static_cast<int32_t>(16 * draw(1, 16));
    const Problem of{draw(0, 1) ? "blocks" : "sortlsh", static_cast<int32_t>(draw(0, 1)), block, 1 << draw(0, 4),
                     static_cast<int32_t>(block * draw(1, 8)), static_cast<int32_t>(draw(1, 16)), static_cast<int32_t>(draw(0, 5000)),
                     8 * draw(1, 32)};
    auto plugin = plugin_of(of);
    const int64_t batch = draw(1, 4), most = int64_t{1} << draw(4, 17), whole = draw(0, 1) ? 256 : 1;  // some end with a tile
    const int64_t most_q = whole * draw(1, std::max<int64_t>(1, most / whole)), most_k = draw(1, most);
    const size_t bytes = planned(*plugin, of, batch, most_q, most_k);
    const int64_t near_q = std::max<int64_t>(1, most_q - 40), near_k = std::max<int64_t>(1, most_k - 300);
    for (int inside = 0; inside < 100; ++inside) {
      fits(bytes, of, batch, draw(near_q, most_q), draw(near_k, most_k));
      fits(bytes, of, batch, draw(near_q, most_q), draw(1, most_k));
      fits(bytes, of, draw(1, batch), draw(1, most_q), draw(near_k, most_k));
    }
  }
}
