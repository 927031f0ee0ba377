#include "attend.cuh"

template void ha::launch_attend<ha::Half, 192>(const ha::AttendArgs&);
