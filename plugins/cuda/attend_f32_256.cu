#include "attend.cuh"

template void ha::launch_attend<float, 256>(const ha::AttendArgs&);
