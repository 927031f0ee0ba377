// How TensorRT comes by the plugin: statically, when the library is opened, or dynamically, through
// IPluginRegistry::loadLibrary and the two functions exported here.
#include "attention.h"
#include "trt_host.h"
#include "trt_plugin.h"

namespace {
ha::trt::Registration registration(ha::trt::creator());
}

// loadLibrary has opened the library, so it may be registered; TensorRT refuses a library one of whose plugins is. It then
// registers what it is given here, and takes that back itself before it unloads the library.
extern "C" HA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&ha::trt::creator()};
  registration.withdraw();
  count = 1;
  return creators;
}

extern "C" HA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { ha::trt::set_logger_finder(finder); }
