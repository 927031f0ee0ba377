// What the host code of every backend shares: checks, the thread's last error, helpers for exported functions.
#pragma once
#include <exception>
#include <string>

#include "attention.h"

namespace ha {

struct Error : std::exception {
  HaStatus status;
  std::string message;
  Error(HaStatus status, std::string message) : status(status), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }
};

// One integer attribute: its name, where it lies, the accepted range and the default (hyperattention/config.py).
struct IntegerField {
  const char* name;
  int32_t HaAttributes::*member;
  int64_t low, high;
  int32_t fallback;
};
constexpr int kIntegerFields = 14;
extern const IntegerField kFields[kIntegerFields];

HaAttributes default_attributes();
// Selector by its ONNX name; throws Error for one that is unknown or not built.
int32_t parse_selector(const std::string& name);
const char* selector_name(int32_t selector);
// `value`, checked. Throws Error(HA_INVALID), naming it, its value and the range.
int64_t in_range(const char* name, int64_t value, int64_t low, int64_t high);
// The same for every attribute, and for those that have to fit together.
void check_attributes(const HaAttributes& attributes);
void check(const HaParams& params);

void set_last_error(const std::string& message) noexcept;

// Runs a function that throws; gives its status and keeps its message for ha_last_error.
template <class F>
int guarded(F&& body) noexcept {
  try {
    body();
    return HA_OK;
  } catch (const Error& error) {
    set_last_error(error.message);
    return error.status;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return HA_FAILED;
  } catch (...) {
    set_last_error("unknown failure");
    return HA_FAILED;
  }
}

}  // namespace ha
