#include "attend.cuh"

template void ha::launch_attend<float, 96>(const ha::AttendArgs&);
