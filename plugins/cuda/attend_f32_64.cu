#include "attend.cuh"

template void ha::launch_attend<float, 64>(const ha::AttendArgs&);
