#include "attend.cuh"

template void ha::launch_attend<ha::Half, 64>(const ha::AttendArgs&);
