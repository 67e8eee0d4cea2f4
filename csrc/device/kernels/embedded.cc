// SPDX-License-Identifier: Apache-2.0
#include "device/kernels/embedded.h"

#ifdef FASTSHARD_FATBIN
// The assembler copies the file in: no generated source.
asm(".section .rodata\n"
    ".balign 16\n"
    "fastshard_fatbin:\n"
    ".incbin \"" FASTSHARD_FATBIN
    "\"\n"
    ".previous\n");
extern "C" const unsigned char fastshard_fatbin[] __attribute__((visibility("hidden")));

const void* fastshard::embedded_kernels() { return fastshard_fatbin; }
#else
const void* fastshard::embedded_kernels() { return nullptr; }
#endif
