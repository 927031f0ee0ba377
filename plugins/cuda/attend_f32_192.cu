#include "attend.cuh"

template void ha::launch_attend<float, 192>(const ha::AttendArgs&);
