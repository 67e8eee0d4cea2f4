// SPDX-License-Identifier: Apache-2.0
// LD_PRELOAD for tests: a process that is refused a thread, a mapping, memory or a descriptor once. refuse("thread", n)
// lets the n-th request from then on fail; 0: none. counted("thread"): how many there were since. Of memory only what
// is asked for without the GIL counts, by the engine: pybind11, which holds it, does not survive a refusal.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

namespace {

struct Kind {
  const char* name;
  std::atomic<long> count{0};
  std::atomic<long> refused{0};

  bool refuses() { return ++count == refused; }
};
Kind threads{"thread"}, maps{"map"}, memory{"memory"};
Kind* const kinds[] = {&threads, &maps, &memory};

Kind& kind_of(const char* name) {
  for (Kind* kind : kinds) {
    if (strcmp(kind->name, name) == 0) return *kind;
  }
  abort();
}

// The function of that name behind this library.
template <typename Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void refuse(const char* what, long call) {
  Kind& kind = kind_of(what);
  kind.refused = call;
  kind.count = 0;
}
long counted(const char* what) { return kind_of(what).count; }

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*function)(void*), void* argument) {
  static auto* const next = real<__typeof__(pthread_create)>("pthread_create");
  if (threads.refuses()) return EAGAIN;
  return next(thread, attributes, function, argument);
}

void* mmap(void* address, size_t nbytes, int protection, int flags, int fd, off_t offset) __THROW {
  static auto* const next = real<__typeof__(mmap)>("mmap");
  if (maps.refuses()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return next(address, nbytes, protection, flags, fd, offset);
}

}  // extern "C"

void* operator new(size_t nbytes) {
  static auto* const holds_gil = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  if (holds_gil != nullptr && !holds_gil() && memory.refuses()) throw std::bad_alloc();
  void* const found = malloc(nbytes != 0 ? nbytes : 1);
  if (found == nullptr) throw std::bad_alloc();
  return found;
}
void operator delete(void* memory_) noexcept { free(memory_); }
void operator delete(void* memory_, size_t) noexcept { free(memory_); }
