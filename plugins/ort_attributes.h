// A node's attributes.
#pragma once
#include "ort_common.h"

namespace ha::ort {

// Missing ones take their default. Throws Error for a wrong type, a value out of range and values that do not fit together.
HaAttributes read_attributes(const OrtKernelInfo* info);

}  // namespace ha::ort
