# ORT_INCLUDE_DIR: the folder of onnxruntime_c_api.h, or false. Order: ORT_ROOT, the system, what was fetched before,
# Debian's libonnxruntime-dev through the machine's own apt mirror, the release on GitHub.
set(ORT_ROOT "$ENV{ORT_ROOT}" CACHE PATH "ONNX Runtime, unpacked")
set(ort_fetched "${HYPERATTENTION_DEPS}/onnxruntime-headers")

macro(ha_find_ort)
  find_path(ORT_INCLUDE_DIR onnxruntime_c_api.h
    HINTS "${ORT_ROOT}" "${ORT_ROOT}/include" PATHS "${ort_fetched}"
    PATH_SUFFIXES onnxruntime onnxruntime/core/session usr/include/onnxruntime include/onnxruntime usr/include/onnxruntime/core/session include)
endmacro()

ha_find_ort()
if(NOT ORT_INCLUDE_DIR AND HYPERATTENTION_FETCH AND NOT ORT_ROOT)
  find_program(apt_get apt-get)
  if(apt_get)
    execute_process(COMMAND bash "${CMAKE_CURRENT_LIST_DIR}/fetch_ort_headers.sh" "${ort_fetched}" ERROR_VARIABLE log RESULT_VARIABLE status)
  endif()
  ha_find_ort()
  if(NOT ORT_INCLUDE_DIR)
    set(ort_archive "${HYPERATTENTION_DEPS}/onnxruntime.tgz")
    file(DOWNLOAD "https://github.com/microsoft/onnxruntime/releases/download/v1.22.0/onnxruntime-linux-x64-1.22.0.tgz"
      "${ort_archive}" INACTIVITY_TIMEOUT 20 STATUS status)
    if(status MATCHES "^0;")
      file(ARCHIVE_EXTRACT INPUT "${ort_archive}" DESTINATION "${ort_fetched}" PATTERNS "*/include/*")
      file(GLOB ort_unpacked "${ort_fetched}/onnxruntime-linux-*")
      set(ORT_ROOT "${ort_unpacked}")
      ha_find_ort()
    endif()
    file(REMOVE "${ort_archive}")
  endif()
endif()
if(ORT_INCLUDE_DIR)
  message(STATUS "ONNX Runtime headers: ${ORT_INCLUDE_DIR}")
endif()
