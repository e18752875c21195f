// What the kernel files of this folder share: a launch whose error becomes a C string.
#pragma once

#include <exception>
#include <string>

#include "emulator/emulator.h"

namespace vitkernels {

// Null, or the error that `run` ended with.
template <class Run>
const char* guarded(const Run& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), emulator::Index3 grid, emulator::Index3 block,
                   size_t shared_bytes, const Arguments&... arguments) {
  return guarded([&] { emulator::launch(kernel, {grid, block, shared_bytes}, arguments...); });
}

}  // namespace vitkernels

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*
