// What Python cannot ask of the plugin: serialised fields, shapes, formats, workspace, cache id. Neither TensorRT nor a GPU.
//
// usage: trt_fields_test LIBRARY CHECK     runs one check; exit 0 = passed, 1 = failed (reasons on standard output)
//        trt_fields_test LIBRARY           lists the checks
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "trt_harness.h"
#include "trt_host.h"

using namespace nvinfer1;

namespace {
int failures = 0;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &recorder; }
} finder;

const std::map<std::string, int32_t> kUnusual = {{"causal", 0},      {"block_size", 32},   {"num_blocks", 3},    {"pool_size", 8},
                                                 {"sample_size", 5}, {"stratified", 0},    {"local_size", 96},   {"local_overlap", 0},
                                                 {"sinks", 7},       {"exact_below", 100}, {"num_projections", 9}, {"seed", 2147483647},
                                                 {"strict_causal", 0}, {"hash_centre", 1}, {"with_lse", 1}};

FieldList unusual() {
  FieldList list;
  for (const auto& [name, value] : kUnusual) list.integer(name, value);
  return list.real("scale", 0.25f).text("selector", "sortlsh");
}

void serialised_fields() {
  auto plugin = unusual().make();
  auto copy = std::unique_ptr<IPluginV3>(plugin->clone());
  const std::string parent = build(*plugin)->getMetadataString();
  const auto* before = runtime(*plugin)->getFieldsToSerialize();
  const auto* fields = runtime(*copy)->getFieldsToSerialize();
  const auto* declared = creator->getFieldNames();
  expect(fields->nbFields == declared->nbFields && fields->nbFields == 17, "17 fields, as declared");
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const std::string name = field.name;
    expect(name == declared->fields[i].name && field.type == declared->fields[i].type, name + " is declared with this type in this place");
    expect(name == "selector" || field.data != before->fields[i].data, name + " of a clone lies in the clone");
    if (field.type == PluginFieldType::kINT32)
      expect(field.length == 1 && *static_cast<const int32_t*>(field.data) == kUnusual.at(name), name + " keeps its value");
    else if (field.type == PluginFieldType::kFLOAT32)
      expect(field.length == 1 && *static_cast<const float*>(field.data) == 0.25f, name + " keeps its value");
    else
      expect(std::string(static_cast<const char*>(field.data), field.length) == "sortlsh", name + " keeps its value");
  }
  plugin.reset();  // the clone has to stand alone
  const auto* again = runtime(*copy)->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> revived(creator->createPlugin("layer", again, TensorRTPhase::kRUNTIME));
  expect(revived && parent == build(*revived)->getMetadataString(), "the engine's fields give the same plugin");
}

void field_forms() {
  const std::string plain = build(*FieldList().make())->getMetadataString();
  const auto same = [&](const FieldList& list, const char* what) {
    auto plugin = list.make();
    expect(plugin && plain == build(*plugin)->getMetadataString(), what);
  };
  same(FieldList().text("selector", std::string("blocks\0", 7)), "a string that counts its final zero");
  same(FieldList().wide("block_size", 64), "a 64-bit integer within the range");
  const std::unique_ptr<IPluginV3> bare(creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD));
  expect(bare && plain == build(*bare)->getMetadataString(), "no fields at all: the defaults");
}

void refused_fields() {
  const std::vector<std::pair<FieldList, std::string>> cases = {
      {FieldList().integer("block_size", 7), "block_size is 7; it takes an integer from 16 to 256"},
      {FieldList().integer("seed", -1), "seed is -1; it takes an integer from 0 to 2147483647"},
      {FieldList().wide("seed", int64_t{1} << 32), "seed is 4294967296; it takes an integer from 0 to 2147483647"},
      {FieldList().integer("with_lse", 2), "with_lse is 2; it takes an integer from 0 to 1"},
      {FieldList().real("block_size", 64), "block_size is 1 x float32; it takes one int32"},
      {FieldList().integer("scale", 1), "scale is 1 x int32; it takes one float32"},
      {FieldList().integer("selector", 0), "selector is 1 x int32; it takes a string"},
      {FieldList().real("scale", -1), "scale is -1"},
      {FieldList().text("selector", "nearest"), "selector is 'nearest'; it takes one of blocks, sortlsh"},
      {FieldList().integer("blocksize", 64), "unknown field blocksize; known: causal, scale, selector, block_size"},
      {FieldList().integer("pool_size", 3), "block_size 64 is not a multiple of pool_size 3"},
      {FieldList().integer("local_size", 1000), "local_size 1000 is not a multiple of block_size 64"},
      {FieldList().integer("sinks", 1).integer("sinks", 2), "sinks is given twice"},
  };
  for (const auto& [list, reason] : cases) {
    recorder.text.clear();
    expect(!list.make(), "refused: " + reason);
    expect(recorder.text.find("HyperAttention[layer]") == 0 && recorder.text.find(reason) != std::string::npos,
           "logged '" + recorder.text + "', expected '" + reason + "'");
  }
}

struct Expression final : IDimensionExpr {};
struct Expressions final : IExprBuilder {};

void output_shapes() {
  Expression e[12];
  Expressions builder;
  DimsExprs in[3], out[2];
  for (int i = 0; i < 3; ++i) in[i] = {4, {&e[4 * i], &e[4 * i + 1], &e[4 * i + 2], &e[4 * i + 3]}};
  auto plugin = unusual().make();
  expect(build(*plugin)->getNbOutputs() == 2, "with_lse = 1 gives two outputs");
  expect(build(*plugin)->getOutputShapes(in, 3, nullptr, 0, out, 2, builder) == 0, "shapes are given");
  expect(out[0].nbDims == 4 && out[0].d[0] == &e[0] && out[0].d[1] == &e[1] && out[0].d[2] == &e[2] && out[0].d[3] == &e[11],
         "O is [batch, query heads, queries, V's head size]");
  expect(out[1].nbDims == 3 && out[1].d[0] == &e[0] && out[1].d[1] == &e[1] && out[1].d[2] == &e[2], "LSE is [batch, heads, queries]");
  expect(build(*FieldList().make())->getNbOutputs() == 1, "with_lse = 0 gives one output");
  expect(build(*plugin)->getOutputShapes(in, 3, nullptr, 0, out, 1, builder) != 0, "one output where with_lse = 1 is refused");
  in[1].nbDims = 3;
  recorder.text.clear();
  expect(build(*plugin)->getOutputShapes(in, 3, nullptr, 0, out, 2, builder) != 0, "K with three dimensions is refused");
  expect(recorder.text.find("K has 3 dimensions") != std::string::npos, "and the reason is logged: " + recorder.text);
}

void formats() {
  auto plugin = unusual().make();
  const auto supports = [&](std::vector<DataType> types, int32_t position, TensorFormat format = TensorFormat::kLINEAR) {
    std::vector<DynamicPluginTensorDesc> all(types.size());
    for (size_t i = 0; i < types.size(); ++i) all[i].desc.type = types[i], all[i].desc.format = TensorFormat::kLINEAR;
    all[position].desc.format = format;
    return build(*plugin)->supportsFormatCombination(position, all.data(), static_cast<int32_t>(types.size()) - 2, 2);
  };
  constexpr DataType h = DataType::kHALF, b = DataType::kBF16, f = DataType::kFLOAT, i = DataType::kINT32, l = DataType::kINT64;
  for (int32_t at = 0; at < 6; ++at) {
    expect(supports({b, b, b, i, b, f}, at) && supports({h, h, h, i, h, f}, at), "fp16 and bf16 at " + std::to_string(at));
    expect(!supports({b, b, b, i, b, f}, at, TensorFormat::kCHW32), "only linear tensors at " + std::to_string(at));
  }
  for (int32_t at = 0; at < 5; ++at) expect(supports({h, h, h, h, f}, at), "without lengths at " + std::to_string(at));
  for (int32_t at = 0; at < 6; ++at) expect(supports({f, f, f, i, f, f}, at), "fp32 at " + std::to_string(at));
  for (const DataType other : {DataType::kINT8, DataType::kFP8, DataType::kINT32, DataType::kBOOL})
    expect(!supports({other, other, other, i, other, f}, 0), "type " + std::to_string(static_cast<int32_t>(other)) + " is refused");
  expect(!supports({b, h, b, i, b, f}, 1) && !supports({b, b, h, i, b, f}, 2) && !supports({b, b, b, i, h, f}, 4),
         "one type for Q, K, V, O");
  expect(!supports({b, b, b, l, b, f}, 3), "lengths are int32");
  expect(!supports({b, b, b, i, b, b}, 5), "LSE is float32");
  DataType out[2];
  const DataType in[4] = {b, b, b, i};
  expect(build(*plugin)->getOutputDataTypes(out, 2, in, 4) == 0 && out[0] == b && out[1] == f, "O has Q's type, LSE float32");
  const DataType wide[3] = {f, f, f};
  expect(build(*plugin)->getOutputDataTypes(out, 2, wide, 3) == 0 && out[0] == f && out[1] == f, "also where it is float32");
}

void refused_shapes() {
  auto plugin = FieldList().make();
  const auto check = [&](std::vector<PluginTensorDesc> in, const std::string& reason) {
    recorder.text.clear();
    const PluginTensorDesc out = in[0];
    expect(runtime(*plugin)->onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1) != 0, "refused: " + reason);
    expect(recorder.text.find(reason) != std::string::npos, "logged '" + recorder.text + "', expected '" + reason + "'");
  };
  const PluginTensorDesc good[3] = {tensor({1, 4, 33, 64}), tensor({1, 2, 33, 64}), tensor({1, 2, 33, 64})};
  void* none[3] = {};
  expect(runtime(*plugin)->enqueue(good, good, none, none, nullptr, nullptr) != 0, "enqueue needs onShapeChange before it");
  check({tensor({1, 4, 33, 64}), tensor({1, 3, 33, 64}), tensor({1, 3, 33, 64})}, "4 query heads over 3 key heads");
  check({tensor({1, 4, 33, 64}), tensor({1, 2, 33, 128}), tensor({1, 2, 33, 64})}, "Q and K must have one head size");
  check({tensor({2, 4, 33, 64}), tensor({1, 2, 33, 64}), tensor({1, 2, 33, 64})}, "the batch sizes must be equal");
  check({tensor({1, 4, 33, 64}), tensor({1, 2, 33, 64}), tensor({1, 2, 34, 64})}, "the same keys");
  const auto two = tensor({2}, DataType::kINT32);
  check({tensor({1, 4, 33, 64}), tensor({1, 2, 33, 64}), tensor({1, 2, 33, 64}), two}, "one length a batch row, [1]");
  const auto n = DataType::kINT8;
  check({tensor({1, 4, 33, 64}, n), tensor({1, 2, 33, 64}, n), tensor({1, 2, 33, 64}, n)}, "float32 (0), float16 (1) or bfloat16 (7)");
  check({tensor({1, 4, 33, 44}), tensor({1, 2, 33, 44}), tensor({1, 2, 33, 44})}, "head_dim is 44");
  check({tensor({1, 4, 33, 64}), tensor({1, 2, 33, 64}), tensor({1, 2, 33, 264})}, "head_dim_v is 264");
}

// Every type with head sizes that are padded to a kernel's, and with values of another size than keys.
void accepted_shapes() {
  auto plugin = FieldList().make();
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    for (const auto& [dim, dim_v] : std::vector<std::pair<int64_t, int64_t>>{{8, 8}, {40, 40}, {96, 96}, {192, 128}, {64, 256}, {256, 256}}) {
      recorder.text.clear();
      const PluginTensorDesc in[3] = {tensor({1, 4, 9001, dim}, type), tensor({1, 2, 9001, dim}, type), tensor({1, 2, 9001, dim_v}, type)};
      expect(runtime(*plugin)->onShapeChange(in, 3, in, 1) == 0, std::to_string(dim) + " and " + std::to_string(dim_v) + ": " + recorder.text);
    }
}

void cache_id() {
  const std::string plain = build(*FieldList().make())->getTimingCacheID();
  expect(plain == build(*FieldList().integer("block_size", 64).make())->getTimingCacheID(), "a default written out is the same");
  const std::map<std::string, int32_t> changes = {{"causal", 0},      {"block_size", 128},  {"num_blocks", 9},    {"pool_size", 8},
                                                  {"sample_size", 5}, {"stratified", 0},    {"local_size", 128},  {"local_overlap", 0},
                                                  {"sinks", 7},       {"exact_below", 100}, {"num_projections", 9}, {"seed", 1},
                                                  {"strict_causal", 1}, {"hash_centre", 1}, {"with_lse", 1}};
  for (const auto& [name, value] : changes)
    expect(plain != build(*FieldList().integer(name, value).make())->getTimingCacheID(), name + " is part of the cache id");
  expect(plain != build(*FieldList().real("scale", 0.25f).make())->getTimingCacheID(), "scale is part of the cache id");
  expect(plain != build(*FieldList().text("selector", "sortlsh").make())->getTimingCacheID(), "selector is part of the cache id");
  expect(plain.find("build") == std::string::npos, "the build is not: it changes nothing that is timed");
}

void contexts() {
  auto plugin = unusual().make();
  std::unique_ptr<IPluginV3> attached(runtime(*plugin)->attachToContext(nullptr));
  expect(attached && attached.get() != plugin.get(), "a context gets a plugin of its own");
  expect(std::string(build(*attached)->getMetadataString()) == build(*plugin)->getMetadataString(), "with the same fields");
  auto* core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  expect(std::string(core->getPluginName()) == creator->getPluginName() && std::string(core->getPluginVersion()) == "1" &&
             std::string(core->getPluginNamespace()) == "hyperattention",
         "plugin and creator agree on name, version and namespace");
}

// Place of a virtual function in the table, as the headers have it (Itanium C++ ABI).
template <class Member>
int place(Member function) {
  ptrdiff_t parts[2];
  static_assert(sizeof(function) == sizeof(parts));
  std::memcpy(parts, &function, sizeof(parts));
  return static_cast<int>((parts[0] - 1) / static_cast<ptrdiff_t>(sizeof(void*)));
}

// The places that trt_host.h has for this release are those of its headers.
void layouts() {
  const ha::trt::Layout& layout = ha::trt::layout_of(NV_TENSORRT_MAJOR);
  const auto same = [](int found, int wanted, const char* name) {
    expect(found == wanted, std::string(name) + " lies at " + std::to_string(wanted) + ", trt_host.h says " + std::to_string(found));
  };
  same(layout.register_creator, place<bool (IPluginRegistry::*)(IPluginCreatorInterface&, const char*) noexcept>(&IPluginRegistry::registerCreator),
       "registerCreator");
  same(layout.deregister_creator, place<bool (IPluginRegistry::*)(const IPluginCreatorInterface&) noexcept>(&IPluginRegistry::deregisterCreator),
       "deregisterCreator");
  same(layout.get_creator, place(&IPluginRegistry::getCreator), "getCreator");
  same(layout.find_logger, place(&ILoggerFinder::findLogger), "findLogger");
  same(layout.log, place(&ILogger::log), "log");
}

const std::map<std::string, std::function<void()>> kChecks = {
    {"serialised_fields", serialised_fields}, {"field_forms", field_forms},         {"refused_fields", refused_fields},
    {"output_shapes", output_shapes},         {"formats", formats},                 {"refused_shapes", refused_shapes},
    {"accepted_shapes", accepted_shapes},     {"workspace", workspace},             {"random_workspace", random_workspace},
    {"cache_id", cache_id},                   {"contexts", contexts},               {"layouts", layouts},
};
}  // namespace

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: trt_fields_test LIBRARY [CHECK]\n"), 2;
  if (argc == 2) {
    for (const auto& check : kChecks) std::printf("%s\n", check.first.c_str());
    return 0;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const auto get_creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  workspace_size = reinterpret_cast<decltype(workspace_size)>(dlsym(library, "ha_cuda_workspace_size"));
  const auto check = kChecks.find(argv[2]);
  if (!get_creators || !set_finder || !workspace_size || check == kChecks.end())
    return std::fprintf(stderr, "no such symbol or check\n"), 2;
  set_finder(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = get_creators(count);
  expect(count == 1 && std::string(creators[0]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "one creator of version 3");
  creator = static_cast<IPluginCreatorV3One*>(creators[0]);
  check->second();
  return failures ? 1 : 0;
}
