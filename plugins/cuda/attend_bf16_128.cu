#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 128>(const ha::AttendArgs&);
