// Messages to TensorRT's logger, and the shell that keeps exceptions out of TensorRT.
#pragma once
#include <NvInferRuntime.h>

#include <cstdio>

#include "config.h"
#include "trt_host.h"

namespace ha::trt {

// Writes "HyperAttention[layer]: text", to standard error where TensorRT has given no logger. Allocates nothing: it also
// reports that memory ran out.
inline void log(nvinfer1::ILogger::Severity severity, const char* layer, const char* text) noexcept {
  char line[1024];
  std::snprintf(line, sizeof(line), "HyperAttention[%s]: %s", layer, text);
  if (!log_line(severity, line)) std::fprintf(stderr, "%s\n", line);
}

// Runs a function that throws: 0, or an error status after logging what was found and what is allowed.
template <class F>
int32_t guarded(const char* layer, F&& body) noexcept {
  const int status = ha::guarded(body);
  if (status != HA_OK) log(nvinfer1::ILogger::Severity::kERROR, layer, ha_last_error());
  return status;
}

}  // namespace ha::trt
