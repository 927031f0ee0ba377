#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 192>(const ha::AttendArgs&);
