#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 64>(const ha::AttendArgs&);
