#include "trt_host.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace ha::trt {
namespace {
using namespace nvinfer1;

template <class Result, class... Arguments>
Result call(void* object, int place, Arguments... arguments) {
  void* function = (*static_cast<void***>(object))[place];
  return reinterpret_cast<Result (*)(void*, Arguments...)>(function)(object, arguments...);
}

template <class Function>
Function* symbol(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

int add_name(dl_phdr_info* info, size_t, void* names) {
  const char* slash = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
  if (slash && std::strncmp(slash + 1, "libnvinfer", 10) == 0) static_cast<std::vector<std::string>*>(names)->push_back(info->dlpi_name);
  return 0;
}

struct Host {
  // Where TensorRT is part of the program and exports nothing, it is taken to be of the headers' release.
  std::atomic<const Layout*> layout{&layout_of(NV_TENSORRT_MAJOR)};
  std::atomic<ILogger* (*)()> logger{nullptr};  // TensorRT's own function, for want of a finder
  std::atomic<ILoggerFinder*> finder{nullptr};
} host;

// Finds the loaded TensorRT and gives its registry, or null. Python and trtexec open it in a scope of its own, which
// dlsym(RTLD_DEFAULT) does not see, so it is looked for by name among the loaded libraries; "" is the program itself with what
// it is linked with. From then on it is never unloaded: `host` keeps pointers into it.
IPluginRegistry* find_tensorrt() {
  std::vector<std::string> names{""};
  dl_iterate_phdr(add_name, &names);
  for (const std::string& name : names) {
    void* library = dlopen(name.empty() ? nullptr : name.c_str(), RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
    if (!library) continue;
    auto* registry = symbol<IPluginRegistry*()>(library, "getPluginRegistry");
    auto* major = symbol<int32_t()>(library, "getInferLibMajorVersion");
    auto* logger = symbol<ILogger*()>(library, "getLogger");
    dlclose(library);
    if (!registry || !major) continue;
    host.logger = logger;
    host.layout = &layout_of(major());
    return registry();
  }
  return nullptr;
}
}  // namespace

Registration::Registration(IPluginCreatorInterface& creator) noexcept : creator_(creator) {
  try {
    IPluginRegistry* registry = find_tensorrt();
    if (!registry) return;
    const Layout& layout = *host.layout.load();
    auto& named = static_cast<IPluginCreatorV3One&>(creator);
    // The registry does not ask a creator for its namespace here, but it does when it takes it back: give the same.
    const char* space = named.getPluginNamespace();
    if (call<IPluginCreatorInterface*>(registry, layout.get_creator, named.getPluginName(), named.getPluginVersion(), space))
      log_line(ILogger::Severity::kINFO, "HyperAttention: a plugin of this name is registered already; this library's is not added");
    else if (call<bool>(registry, layout.register_creator, &creator, space))
      registry_ = registry;
  } catch (...) {  // memory ran out while the library was being opened: it is then not registered
  }
}

void Registration::withdraw() noexcept {
  IPluginRegistry* registry = std::exchange(registry_, nullptr);
  if (registry) call<bool>(registry, host.layout.load()->deregister_creator, static_cast<const IPluginCreatorInterface*>(&creator_));
}

void set_logger_finder(ILoggerFinder* finder) noexcept {
  try {
    find_tensorrt();  // which may have been loaded after this library
  } catch (...) {     // memory ran out: the layout stays as it is known
  }
  host.finder = finder;
}

bool log_line(ILogger::Severity severity, const char* line) noexcept {
  try {
    const Layout& layout = *host.layout.load();
    ILogger* logger = nullptr;
    if (ILoggerFinder* finder = host.finder) logger = call<ILogger*>(finder, layout.find_logger);
    if (!logger)
      if (auto* function = host.logger.load()) logger = function();
    if (logger) call<void>(logger, layout.log, severity, line);
    return logger != nullptr;
  } catch (...) {  // findLogger may throw
    return false;
  }
}

}  // namespace ha::trt
