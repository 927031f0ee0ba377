// How the copy engine sees a tensor: [slices, rows, columns] in boxes of 64 rows and 64 columns, swizzled for the tensor cores.
#pragma once
#include "sm90_config.h"
#include "sm90_device.cuh"

#ifdef HA_EMULATE
namespace ha {

inline TileMap tile_map(const void* base, int32_t, int64_t slices, int64_t rows, int64_t columns) {
  return {base, slices, rows, columns, kTileKeys, kTileColumns};
}

}  // namespace ha
#else
#include <cuda.h>

#include "launch.cuh"

namespace ha {

// The driver's function by way of the runtime: libcuda is not linked.
inline decltype(&cuTensorMapEncodeTiled) tile_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    require_success(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
                    "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || !function)
      throw Error(HA_FAILED, "the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer has it: update the driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

// `base` = 16-byte aligned 16-bit elements, dense; what a box reaches beyond a slice is read as zero.
inline TileMap tile_map(const void* base, int32_t dtype, int64_t slices, int64_t rows, int64_t columns) {
  static_assert(sizeof(TileMap) == sizeof(CUtensorMap));
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(slices)};
  const cuuint64_t strides[2] = {cuuint64_t(columns * 2), cuuint64_t(rows * columns * 2)};
  const cuuint32_t box[3] = {kTileColumns, kTileKeys, 1}, steps[3] = {1, 1, 1};
  TileMap map;
  const CUresult status = tile_map_encoder()(
      reinterpret_cast<CUtensorMap*>(&map), dtype == HA_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error(HA_FAILED, "cuTensorMapEncodeTiled failed with " + std::to_string(int(status)) + " for [" + std::to_string(slices) + ", " +
                               std::to_string(rows) + ", " + std::to_string(columns) + "]");
  return map;
}

}  // namespace ha
#endif
