#include "attend.cuh"

template void ha::launch_attend<ha::Half, 128>(const ha::AttendArgs&);
