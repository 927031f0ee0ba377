#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 256>(const ha::AttendArgs&);
