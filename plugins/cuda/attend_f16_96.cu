#include "attend.cuh"

template void ha::launch_attend<ha::Half, 96>(const ha::AttendArgs&);
