// SPDX-License-Identifier: Apache-2.0
// The interpreter's lock (GIL), which is released in every call that can block.
#pragma once

#include <Python.h>

namespace fastshard {

// Like PyEval_RestoreThread(). When the interpreter ends, Python before 3.14 ends a returning daemon thread with
// pthread_exit(). That unwinds the stack through destructors that must not throw, so the process would be aborted. Here
// the thread waits for the end of the process instead, as in newer versions.
void take_gil(PyThreadState* state) noexcept;

}  // namespace fastshard
