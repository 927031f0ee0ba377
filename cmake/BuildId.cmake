# HA_VERSION, and HA_BUILD_ID: a hash of every native source, so that `hyperattention doctor` can tell whether a library is
# built from the sources beside it. hyperattention/doctor.py computes the same.
file(STRINGS "${PROJECT_SOURCE_DIR}/pyproject.toml" version_line REGEX "^version = ")
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" HA_VERSION "${version_line}")

file(GLOB_RECURSE native_sources CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}"
  plugins/*.h plugins/*.cuh plugins/*.cpp plugins/*.cu plugins/*.inl)
list(SORT native_sources COMPARE STRING)
set(listing "")
foreach(source IN LISTS native_sources)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
  file(SHA256 "${PROJECT_SOURCE_DIR}/${source}" hash)
  string(APPEND listing "${hash}  ${source}\n")
endforeach()
string(SHA256 HA_BUILD_ID "${listing}")
string(SUBSTRING "${HA_BUILD_ID}" 0 16 HA_BUILD_ID)
