#include "ort_attributes.h"

namespace ha::ort {
namespace {

class NodeAttributes {
 public:
  explicit NodeAttributes(const OrtKernelInfo* info) : info_(info) {}

  HaAttributes parse() const {
    HaAttributes attributes = default_attributes();
    for (const auto& field : kFields) {
      int64_t value = field.fallback;
      if (!read(api_.KernelInfoGetAttribute_int64, field.name, value)) refuse_other_type(field.name, "an integer");
      attributes.*field.member = int32_t(in_range(field.name, value, field.low, field.high));
    }
    if (!read(api_.KernelInfoGetAttribute_float, "scale", attributes.scale)) refuse_other_type("scale", "a float");
    std::string selector;
    if (read_text("selector", selector)) {
      attributes.selector = parse_selector(selector);
    } else {
      refuse_other_type("selector", "a string");
    }
    check_attributes(attributes);
    return attributes;
  }

 private:
  template <class T>
  bool read(OrtStatus*(ORT_API_CALL* get)(const OrtKernelInfo*, const char*, T*) noexcept, const char* name, T& value) const {
    T found;
    const Ort::Status status{get(info_, name, &found)};
    if (status.IsOK()) value = found;
    return status.IsOK();
  }

  bool read_text(const char* name, std::string& value) const {
    size_t size = 0;
    if (!Ort::Status{api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)}.IsOK()) return false;
    value.resize(size);
    ok(api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);  // without the final zero
    return true;
  }

  // ONNX Runtime answers alike for an attribute that is missing and for one of another type: only the first is fine.
  void refuse_other_type(const char* name, const char* wanted) const {
    int64_t integer;
    float number;
    std::string text;
    size_t size = 0;
    const char* found = nullptr;
    // The list query answers for an attribute of any type, so it comes first.
    if (Ort::Status{api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)}.IsOK()) found = "of another type";
    if (read(api_.KernelInfoGetAttribute_int64, name, integer)) found = "an integer";
    if (read(api_.KernelInfoGetAttribute_float, name, number)) found = "a float";
    if (read_text(name, text)) found = "a string";
    if (found) throw Error(HA_INVALID, std::string(name) + " is " + found + "; it takes " + wanted);
  }

  const OrtApi& api_ = Ort::GetApi();
  const OrtKernelInfo* info_;
};

}  // namespace

HaAttributes read_attributes(const OrtKernelInfo* info) { return NodeAttributes(info).parse(); }

}  // namespace ha::ort
