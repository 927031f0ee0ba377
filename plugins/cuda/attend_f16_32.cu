#include "attend.cuh"

template void ha::launch_attend<ha::Half, 32>(const ha::AttendArgs&);
