#include "sm90_attend.cuh"

template void ha::launch_hopper<ha::Half, 128>(const ha::AttendArgs&);
