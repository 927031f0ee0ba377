// The creator of the plugin; there is one in this library.
#pragma once
#include <NvInferRuntime.h>

namespace ha::trt {

nvinfer1::IPluginCreatorInterface& creator();

}  // namespace ha::trt
