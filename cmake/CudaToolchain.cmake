# HA_CUDA_FOUND and the language CUDA, or HA_CUDA_MISSING: why not. Order: CUDA_HOME, the project's own copy of the wheels (.deps/cuda), the wheels in the
# Python that drives the build (an isolated `pip install` has them there), nvcc on the PATH.
set(CUDA_HOME "$ENV{CUDA_HOME}" CACHE PATH "CUDA toolkit 13")
set(HA_CUDA_FOUND FALSE)
set(HA_CUDA_MISSING "no CUDA 13 compiler (pip install the nvidia-* build requirements of pyproject.toml, or set CUDA_HOME)")

set(wheel_roots "${HYPERATTENTION_DEPS}/cuda/nvidia/cu13")
find_package(Python3 QUIET COMPONENTS Interpreter)
if(Python3_EXECUTABLE)
  execute_process(COMMAND "${Python3_EXECUTABLE}" -c "import nvidia; print(';'.join(p + '/cu13' for p in nvidia.__path__))"
    OUTPUT_VARIABLE python_roots OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND wheel_roots ${python_roots})
endif()

find_program(HA_NVCC nvcc HINTS "${CUDA_HOME}/bin" NO_DEFAULT_PATH)
foreach(root IN LISTS wheel_roots)
  find_program(HA_NVCC nvcc HINTS "${root}/bin" NO_DEFAULT_PATH)
endforeach()
find_program(HA_NVCC nvcc PATHS /usr/local/cuda/bin)

if(HA_NVCC)
  execute_process(COMMAND "${HA_NVCC}" --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" nvcc_release "${nvcc_version}")
  if(NOT CMAKE_MATCH_1 GREATER_EQUAL 13)
    set(HA_CUDA_MISSING "nvcc at ${HA_NVCC} is '${nvcc_release}'; 13.0 or newer is needed")
  else()
    get_filename_component(HA_CUDA_ROOT "${HA_NVCC}" REALPATH)
    get_filename_component(HA_CUDA_ROOT "${HA_CUDA_ROOT}/../.." ABSOLUTE)
    # The wheels keep their libraries in lib, where nvcc's own profile looks only in lib64.
    find_path(HA_CUDA_LIBRARY_DIR libcudart_static.a PATHS "${HA_CUDA_ROOT}" PATH_SUFFIXES lib lib64 NO_DEFAULT_PATH)
    find_path(HA_CUDA_INCLUDE_DIR cuda_runtime_api.h PATHS "${HA_CUDA_ROOT}/include" NO_DEFAULT_PATH)
    set(CMAKE_CUDA_COMPILER "${HA_NVCC}")
    set(CMAKE_CUDA_FLAGS_INIT "-L${HA_CUDA_LIBRARY_DIR}")
    set(CMAKE_CUDA_ARCHITECTURES "${HYPERATTENTION_CUDA_ARCHITECTURES}")
    enable_language(CUDA)
    set(HA_CUDA_FOUND TRUE)
    message(STATUS "CUDA compiler: ${nvcc_release} for ${HYPERATTENTION_CUDA_ARCHITECTURES}")
  endif()
endif()
