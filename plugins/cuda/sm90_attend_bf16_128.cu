#include "sm90_attend.cuh"

template void ha::launch_hopper<ha::Bfloat16, 128>(const ha::AttendArgs&);
