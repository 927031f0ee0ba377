#include "attend.cuh"

template void ha::launch_attend<float, 32>(const ha::AttendArgs&);
