#include "kernels.h"

#include <cstdlib>
#include <string>

#include "config.h"

namespace ha::cpu {

namespace avx512 {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace generic {
extern const Kernels kTable;
}

namespace {
const Kernels& choose() {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  const char* wanted = std::getenv("HYPERATTENTION_CPU");
  std::string allowed;
  for (const auto& [table, runs] : {std::pair{&avx512::kTable, has_avx512}, {&avx2::kTable, has_avx2}, {&generic::kTable, true}}) {
    if (!runs) continue;
    if (!wanted || std::string(wanted) == table->name) return *table;
    allowed += (allowed.empty() ? "" : ", ") + std::string(table->name);
  }
  throw Error(HA_INVALID, "HYPERATTENTION_CPU is '" + std::string(wanted) + "'; this processor takes one of " + allowed);
}
}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace ha::cpu
