#include "sm90_attend.cuh"

template void ha::launch_hopper<ha::Half, 64>(const ha::AttendArgs&);
