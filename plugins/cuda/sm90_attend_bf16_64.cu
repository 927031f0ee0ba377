#include "sm90_attend.cuh"

template void ha::launch_hopper<ha::Bfloat16, 64>(const ha::AttendArgs&);
