#include "attend.cuh"

template void ha::launch_attend<ha::Bfloat16, 96>(const ha::AttendArgs&);
