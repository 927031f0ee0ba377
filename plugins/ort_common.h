// What every part of the ONNX Runtime op shares. Not linked with libonnxruntime: everything goes through the OrtApi that the
// host hands to RegisterCustomOps.
#pragma once
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <string>
#include <vector>

#include "config.h"

namespace ha::ort {

inline void ok(OrtStatus* status) { Ort::ThrowOnError(status); }

// Runs a function that throws; nothing may pass through ONNX Runtime's C interface.
template <class F>
OrtStatus* guarded(F&& body) noexcept {
  const auto failed = [](OrtErrorCode code, const std::string& text) {
    return Ort::GetApi().CreateStatus(code, ("HyperAttention: " + text).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return failed(error.status == HA_FAILED ? ORT_FAIL : ORT_INVALID_ARGUMENT, error.message);
  } catch (const Ort::Exception& error) {
    return failed(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return failed(ORT_FAIL, error.what());
  }
}

}  // namespace ha::ort
