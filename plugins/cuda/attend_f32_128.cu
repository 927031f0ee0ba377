#include "attend.cuh"

template void ha::launch_attend<float, 128>(const ha::AttendArgs&);
