// Elements of Q and K as the selectors read them: 16 bytes at a time, in fp32; and the choice of their type at run time.
#pragma once
#include "device.cuh"

namespace ha {

template <class T>
constexpr int kPieceElements = 16 / int(sizeof(T));

// The elements of one piece of 16 bytes: x[0] .. x[kPieceElements<T> - 1].
template <class T>
HA_DEVICE void unpack(const Words4& piece, float* x) {
#pragma unroll
  for (int i = 0; i < kPieceElements<T>; ++i) {
    if constexpr (sizeof(T) == 4) x[i] = bits_float(piece.w[i]);
    else x[i] = to_float(T{uint16_t(piece.w[i / 2] >> (i % 2 * 16))});
  }
}

// Calls body(T()) with the element type T that `dtype` names.
template <class Body>
void with_elements(int32_t dtype, const Body& body) {
  if (dtype == HA_FLOAT32) body(float{});
  else if (dtype == HA_FLOAT16) body(Half{});
  else body(Bfloat16{});
}

}  // namespace ha
