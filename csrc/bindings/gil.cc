// SPDX-License-Identifier: Apache-2.0
// Compiled without exceptions: so the handler below is found by pthread_exit() itself, which needs no personality
// routine for it. With exceptions it would be a destructor, which is called through the unwinder that this module is
// linked with, and that of pthread_exit() may be another one (wheels have LLVM's): the process would crash.
#include "bindings/gil.h"

#include <pthread.h>
#include <unistd.h>

namespace fastshard {
namespace {

void stay(void*) {
  for (;;) pause();
}

}  // namespace

void take_gil(PyThreadState* state) noexcept {
  pthread_cleanup_push(stay, nullptr);
  PyEval_RestoreThread(state);
  pthread_cleanup_pop(0);
}

}  // namespace fastshard
