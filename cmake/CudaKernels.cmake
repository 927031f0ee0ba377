# hyperattention_cuda: the CUDA kernels and their C interface as objects. Whoever links it also gets its headers and the static
# CUDA runtime; libcuda is not linked, so both libraries load on a machine without a driver. HA_CUDA_OBJECTS lists it and, with
# Hopper kernels, hyperattention_cuda_sm90; HA_CUDA_ARCHITECTURES is what they are compiled for.
# HYPERATTENTION_HEAD_SIZES leaves instances of the attention kernels out, three files a size: a build for one GPU and one head size
# takes a fraction of the time.
file(GLOB sources CONFIGURE_DEPENDS plugins/cuda/*.cu)
set(known 32 64 96 128 192 256)
set(bits 0)
foreach(size IN LISTS HYPERATTENTION_HEAD_SIZES)
  list(FIND known "${size}" place)
  if(place EQUAL -1)
    message(FATAL_ERROR "HYPERATTENTION_HEAD_SIZES has '${size}'; it takes a list of ${known}")
  endif()
  math(EXPR bits "${bits} | (1 << ${place})")
endforeach()
foreach(size IN LISTS known)
  if(NOT size IN_LIST HYPERATTENTION_HEAD_SIZES)
    list(FILTER sources EXCLUDE REGEX "attend_[a-z0-9]+_${size}\\.cu$")
  endif()
endforeach()

# ha_cuda_objects(NAME ARCHITECTURES SOURCES...): a set of objects, each compiled for all of these architectures.
function(ha_cuda_objects name architectures)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE plugins)
  target_compile_definitions(${name} PRIVATE HA_HEAD_SIZES=${bits} HA_HOPPER=${hopper})
  target_include_directories(${name} SYSTEM INTERFACE "${HA_CUDA_INCLUDE_DIR}")
  target_link_directories(${name} INTERFACE "${HA_CUDA_LIBRARY_DIR}")
  target_link_libraries(${name} INTERFACE cudart_static dl rt pthread)
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_RUNTIME_LIBRARY Static)
endfunction()

# The Hopper kernels, sm90_*.cu: WGMMA and TMA are in the instruction set of 90a alone, which no other GPU runs, and no other source
# sees CUTLASS. HA_HOPPER tells the dispatch whether they are there.
set(sm90_sources ${sources})
list(FILTER sources EXCLUDE REGEX "/sm90_[^/]*$")
list(FILTER sm90_sources INCLUDE REGEX "/sm90_[^/]*$")
set(wanted "${HYPERATTENTION_CUDA_ARCHITECTURES}")
list(TRANSFORM wanted REPLACE "^native$" "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
list(FILTER wanted INCLUDE REGEX "^90a?(-real)?$")
set(hopper 0)
if(HYPERATTENTION_HOPPER AND wanted AND sm90_sources MATCHES "/sm90_attend_")
  include(CutlassHeaders)
  if(NOT CUTLASS_INCLUDE_DIR)
    message(FATAL_ERROR "HYPERATTENTION_CUDA_ARCHITECTURES has '${wanted}', whose kernels need CUTLASS's headers; ${CUTLASS_MISSING}")
  endif()
  set(hopper 1)
endif()

set(HA_CUDA_OBJECTS hyperattention_cuda)
set(HA_CUDA_ARCHITECTURES ${HYPERATTENTION_CUDA_ARCHITECTURES})
ha_cuda_objects(hyperattention_cuda "${HYPERATTENTION_CUDA_ARCHITECTURES}" ${sources})
if(hopper)
  ha_cuda_objects(hyperattention_cuda_sm90 90a-real ${sm90_sources})
  target_include_directories(hyperattention_cuda_sm90 SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
  list(APPEND HA_CUDA_OBJECTS hyperattention_cuda_sm90)
  list(APPEND HA_CUDA_ARCHITECTURES 90a-real)
  list(REMOVE_DUPLICATES HA_CUDA_ARCHITECTURES)
endif()
