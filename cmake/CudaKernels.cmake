# hyperattention_cuda: the CUDA kernels and their C interface as objects. Whoever links it also gets its headers and the static
# CUDA runtime; libcuda is not linked, so both libraries load on a machine without a driver.
file(GLOB sources CONFIGURE_DEPENDS plugins/cuda/*.cu)
add_library(hyperattention_cuda OBJECT ${sources})
target_include_directories(hyperattention_cuda PRIVATE plugins)
target_include_directories(hyperattention_cuda SYSTEM INTERFACE "${HA_CUDA_INCLUDE_DIR}")
target_link_directories(hyperattention_cuda INTERFACE "${HA_CUDA_LIBRARY_DIR}")
target_link_libraries(hyperattention_cuda INTERFACE cudart_static dl rt pthread)
set_target_properties(hyperattention_cuda PROPERTIES CUDA_ARCHITECTURES "${HYPERATTENTION_CUDA_ARCHITECTURES}" CUDA_RUNTIME_LIBRARY Static)
