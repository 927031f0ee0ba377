#include "attend.cuh"

template void ha::launch_attend<ha::Half, 256>(const ha::AttendArgs&);
