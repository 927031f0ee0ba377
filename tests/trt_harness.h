// What the plugin's native checks share: the library under test, its fields and tensors, and how a check fails.
#pragma once
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"

struct Recorder final : nvinfer1::ILogger {
  std::string text;
  void log(Severity, const char* line) noexcept override { text += std::string(line) + "\n"; }
};

inline Recorder recorder;                                             // what the plugin logs
inline nvinfer1::IPluginCreatorV3One* creator = nullptr;              // of the library under test
inline int (*workspace_size)(const HaParams*, size_t*) = nullptr;     // its ha_cuda_workspace_size

// Counts and prints a failure unless `ok`.
void expect(bool ok, const std::string& what);

// A plugin's fields as TensorRT would pass them.
class FieldList {
 public:
  FieldList& integer(const std::string& name, int32_t value) { return add(name, nvinfer1::PluginFieldType::kINT32, &value, 4, 1); }
  FieldList& wide(const std::string& name, int64_t value) { return add(name, nvinfer1::PluginFieldType::kINT64, &value, 8, 1); }
  FieldList& real(const std::string& name, float value) { return add(name, nvinfer1::PluginFieldType::kFLOAT32, &value, 4, 1); }
  FieldList& text(const std::string& name, const std::string& value) {
    return add(name, nvinfer1::PluginFieldType::kCHAR, value.data(), value.size(), static_cast<int32_t>(value.size()));
  }
  std::unique_ptr<nvinfer1::IPluginV3> make(nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) const {
    std::vector<nvinfer1::PluginField> fields;
    for (const auto& item : items_) fields.emplace_back(item->name.c_str(), item->data.data(), item->type, item->length);
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<nvinfer1::IPluginV3>(creator->createPlugin("layer", &collection, phase));
  }

 private:
  struct Item {
    std::string name;
    nvinfer1::PluginFieldType type;
    std::vector<char> data;
    int32_t length;
  };
  FieldList& add(const std::string& name, nvinfer1::PluginFieldType type, const void* data, size_t bytes, int32_t length) {
    const char* first = static_cast<const char*>(data);
    items_.push_back(std::make_shared<Item>(Item{name, type, std::vector<char>(first, first + bytes), length}));
    return *this;
  }
  std::vector<std::shared_ptr<Item>> items_;
};

inline nvinfer1::IPluginV3OneBuild* build(nvinfer1::IPluginV3& plugin) {
  return static_cast<nvinfer1::IPluginV3OneBuild*>(plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
inline nvinfer1::IPluginV3OneRuntime* runtime(nvinfer1::IPluginV3& plugin) {
  return static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

inline nvinfer1::PluginTensorDesc tensor(std::vector<int64_t> shape, nvinfer1::DataType type = nvinfer1::DataType::kBF16) {
  nvinfer1::PluginTensorDesc desc{};
  desc.dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), desc.dims.d);
  desc.type = type;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  return desc;
}

// In trt_workspace_test.cpp.
void workspace();
void random_workspace();
