#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 32>(const ha::AttendArgs&);
