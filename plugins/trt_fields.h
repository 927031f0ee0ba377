// The plugin's fields: names and types as declared to TensorRT, and their values to and from PluginFieldCollection.
#pragma once
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "config.h"

namespace ha::trt {

// What a plugin is made of. ONNX does not tell a plugin how many outputs its node has, so a field does.
struct Fields {
  HaAttributes attributes = default_attributes();
  int32_t with_lse = 0;
};

inline const char* type_name(nvinfer1::PluginFieldType type) {
  static const char* const names[] = {"float16", "float32", "float64", "int8",  "int16", "int32", "char",
                                      "dims",    "unknown", "bfloat16", "int64", "fp8",   "int4",  "fp4"};
  const auto at = static_cast<size_t>(type);
  return at < sizeof(names) / sizeof(names[0]) ? names[at] : "an unknown type";
}

[[noreturn]] inline void refuse(const nvinfer1::PluginField& field, const char* takes) {
  throw Error(HA_INVALID, std::string(field.name) + " is " + (field.data ? "" : "an empty field of ") + std::to_string(field.length) +
                              " x " + type_name(field.type) + "; it takes " + takes);
}

inline int64_t integer(const nvinfer1::PluginField& field) {
  if (field.data && field.length == 1) {
    if (field.type == nvinfer1::PluginFieldType::kINT32) return *static_cast<const int32_t*>(field.data);
    if (field.type == nvinfer1::PluginFieldType::kINT64) return *static_cast<const int64_t*>(field.data);
  }
  refuse(field, "one int32");
}

inline int32_t ranged(const nvinfer1::PluginField& field, int64_t low, int64_t high) {
  return static_cast<int32_t>(in_range(field.name, integer(field), low, high));
}

inline float number(const nvinfer1::PluginField& field) {
  if (field.data && field.length == 1) {
    if (field.type == nvinfer1::PluginFieldType::kFLOAT32) return *static_cast<const float*>(field.data);
    if (field.type == nvinfer1::PluginFieldType::kFLOAT64) return static_cast<float>(*static_cast<const double*>(field.data));
  }
  refuse(field, "one float32");
}

// A string, with or without the final zero that some parsers count.
inline std::string text(const nvinfer1::PluginField& field) {
  if (field.type != nvinfer1::PluginFieldType::kCHAR || !field.data || field.length < 0) refuse(field, "a string of char");
  const auto* data = static_cast<const char*>(field.data);
  return std::string(data, strnlen(data, static_cast<size_t>(field.length)));
}

// Calls visit(name, type, data) for every field in the order of hyperattention/config.py; `selector` holds its name.
template <class F>
void each_field(const Fields& fields, const char* selector, F&& visit) {
  using nvinfer1::PluginFieldType;
  for (const auto& field : kFields) {
    visit(field.name, PluginFieldType::kINT32, &(fields.attributes.*field.member), 1);
    if (&field != &kFields[0]) continue;
    visit("scale", PluginFieldType::kFLOAT32, &fields.attributes.scale, 1);
    visit("selector", PluginFieldType::kCHAR, selector, static_cast<int32_t>(std::strlen(selector)));
  }
  visit("with_lse", PluginFieldType::kINT32, &fields.with_lse, 1);
}

// Values that point into `fields` and `selector`, which have to outlive the result.
inline std::vector<nvinfer1::PluginField> list_fields(const Fields& fields, const char* selector) {
  std::vector<nvinfer1::PluginField> list;
  each_field(fields, selector, [&](const char* name, nvinfer1::PluginFieldType type, const void* data, int32_t length) {
    list.emplace_back(name, data, type, length);
  });
  return list;
}

// The declared fields, without values.
inline std::vector<nvinfer1::PluginField> declare_fields() {
  std::vector<nvinfer1::PluginField> list = list_fields(Fields{}, "");
  for (auto& field : list) field.data = nullptr, field.length = 1;
  return list;
}

inline void parse_field(const nvinfer1::PluginField& field, Fields& fields) {
  const std::string name = field.name;
  if (name == "scale") {
    fields.attributes.scale = number(field);
  } else if (name == "selector") {
    fields.attributes.selector = parse_selector(text(field));
  } else if (name == "with_lse") {
    fields.with_lse = ranged(field, 0, 1);
  } else {
    for (const auto& known : kFields)
      if (name == known.name) {
        fields.attributes.*known.member = ranged(field, known.low, known.high);
        return;
      }
    std::string all;
    for (const auto& known : declare_fields()) all += (all.empty() ? "" : ", ") + std::string(known.name);
    throw Error(HA_INVALID, "unknown field " + name + "; known: " + all);
  }
}

// Fields of a new plugin, from the ONNX node or from an engine: a missing one has its default, any other fault throws.
inline Fields parse_fields(const nvinfer1::PluginFieldCollection* collection) {
  Fields fields;
  std::set<std::string> seen;
  for (int32_t i = 0; collection && i < collection->nbFields; ++i) {
    const nvinfer1::PluginField& field = collection->fields[i];
    if (!field.name) throw Error(HA_INVALID, "field " + std::to_string(i) + " has no name");
    if (!seen.insert(field.name).second) throw Error(HA_INVALID, std::string("field ") + field.name + " is given twice");
    parse_field(field, fields);
  }
  check_attributes(fields.attributes);
  return fields;
}

// All fields in one line: two plugins behave alike if and only if their lines are equal.
inline std::string describe(const Fields& fields) {
  std::string line;
  char value[64];
  each_field(fields, selector_name(fields.attributes.selector),
             [&](const char* name, nvinfer1::PluginFieldType type, const void* data, int32_t) {
               if (type == nvinfer1::PluginFieldType::kINT32)
                 std::snprintf(value, sizeof(value), "%d", *static_cast<const int32_t*>(data));
               else if (type == nvinfer1::PluginFieldType::kFLOAT32)
                 std::snprintf(value, sizeof(value), "%.9g", static_cast<double>(*static_cast<const float*>(data)));
               else
                 std::snprintf(value, sizeof(value), "%s", static_cast<const char*>(data));
               line += (line.empty() ? "" : " ") + std::string(name) + "=" + value;
             });
  return line;
}

}  // namespace ha::trt
