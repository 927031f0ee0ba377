// The TensorRT of this process. libnvinfer is not linked, so its release is known only at run time, and from 11.0 on three
// interfaces are laid out differently: IPluginRegistry lost the functions that 10 deprecated, ILogger and ILoggerFinder gained
// a base class. What is called of these three goes by its place in the running release's virtual table, never by the headers'.
#pragma once
#include <NvInferRuntime.h>

namespace ha::trt {

// Places in the virtual tables of IPluginRegistry, ILoggerFinder and ILogger.
struct Layout {
  int register_creator, get_creator, deregister_creator, find_logger, log;
};
inline constexpr Layout kLayout10{12, 14, 15, 0, 0};
inline constexpr Layout kLayout11{8, 10, 11, 4, 4};
constexpr const Layout& layout_of(int major) { return major < 11 ? kLayout10 : kLayout11; }

// A registration in TensorRT's global plugin registry: what a program gets that opens this library with dlopen (trtexec
// --staticPlugins, ctypes, Polygraphy). It takes itself back when it is destroyed, that is when this library is unloaded.
class Registration {
 public:
  // Nothing happens where the process has no TensorRT yet; where the name is registered already the first one stays.
  explicit Registration(nvinfer1::IPluginCreatorInterface& creator) noexcept;
  ~Registration() { withdraw(); }
  Registration(const Registration&) = delete;
  // Every call but the first does nothing.
  void withdraw() noexcept;

 private:
  nvinfer1::IPluginCreatorInterface& creator_;
  nvinfer1::IPluginRegistry* registry_ = nullptr;  // null: not registered
};

// Given by IPluginRegistry::loadLibrary; null where the library was opened by other means.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
// Hands a line to TensorRT's logger; false where there is none.
bool log_line(nvinfer1::ILogger::Severity severity, const char* line) noexcept;

}  // namespace ha::trt
