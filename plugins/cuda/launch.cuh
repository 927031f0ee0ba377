// Starts a kernel on the caller's stream. Dynamic shared memory above the default is granted once a kernel and device.
#pragma once
#include <atomic>
#include <string>

#include "config.h"
#include "device.cuh"

namespace ha {

#ifdef HA_EMULATE
template <auto kKernel, class Args>
void launch(int64_t blocks, int threads, size_t shared, void*, const Args& args) {
  emulate(blocks, threads, shared, [&] { kKernel(args); });
}
#else
inline void require_success(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for the caller's next call
  throw Error(HA_FAILED, std::string(what) + " failed: " + cudaGetErrorString(status));
}

// An attribute of the current device; the first devices' are remembered.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // plus one, because attributes may be 0
  int device = 0, value = 0;
  require_success(cudaGetDevice(&device), "cudaGetDevice");
  if (device < kDevices) value = known[device].load(std::memory_order_relaxed) - 1;
  if (device >= kDevices || value < 0) {
    require_success(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    if (device < kDevices) known[device].store(value + 1, std::memory_order_relaxed);
  }
  return value;
}
inline int64_t processor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
// 90 for compute capability 9.0.
inline int compute_capability() {
  return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() + device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

// Bytes of shared memory that the current device grants a block of threads.
inline int64_t shared_limit() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

template <auto kKernel>
void grant_shared_memory(size_t bytes) {
  constexpr size_t kDefault = 48 * 1024;
  constexpr int kDevices = 64;
  if (bytes <= kDefault) return;
  static std::atomic<int> granted[kDevices];
  int device = 0;
  require_success(cudaGetDevice(&device), "cudaGetDevice");
  int limit = device < kDevices ? granted[device].load(std::memory_order_acquire) : 0;
  if (!limit) {
    limit = int(shared_limit());
    // Always the device's maximum: two threads that race here set the same value.
    require_success(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "cudaFuncSetAttribute");
    if (device < kDevices) granted[device].store(limit, std::memory_order_release);
  }
  if (bytes > size_t(limit))
    throw Error(HA_UNSUPPORTED,
                "the kernel needs " + std::to_string(bytes) + " bytes of shared memory, the GPU grants " + std::to_string(limit));
}

template <auto kKernel, class Args>
void launch(int64_t blocks, int threads, size_t shared, void* stream, const Args& args) {
  constexpr int64_t kMaxBlocks = INT32_MAX;
  if (blocks == 0) return;
  if (blocks > kMaxBlocks)
    throw Error(HA_UNSUPPORTED, "batch x heads x tiles is " + std::to_string(blocks) + "; the CUDA kernels take up to " +
                                    std::to_string(kMaxBlocks) + ": split the batch");
  grant_shared_memory<kKernel>(shared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  require_success(cudaLaunchKernelEx(&config, kKernel, args), "kernel launch");
}
#endif

}  // namespace ha
