// SPDX-License-Identifier: Apache-2.0
// LD_PRELOAD for tests: a filesystem that refuses what some mounts refuse. REFUSE holds words such as
// "tmpfile fallocate exchange link linkat unlink rename fsync range xattr chmod locks direct pwrite pwritev readv statx
// io_uring"; each makes that call fail with ENOTSUP, or with the number behind a colon ("rename:5"); with 999 the
// process is killed there. "rename@2" refuses the second call only. Some words refuse nothing. "short": pwrite writes
// half of what it is given and a piece of a block. "pause": rename waits half a second. "nap": pwritev does a second.
// "slow:3": pwritev waits for three process_vm_readv ("readv"). "late": what "range" refuses takes half a second.
// "nfs": every file is said to lie on NFS. `refused_calls` counts.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

int refused_calls;

static int refused(const char* what, int* calls) {
  const char* list = getenv("REFUSE");
  const size_t length = strlen(what);
  const int call = __atomic_add_fetch(calls, 1, __ATOMIC_RELAXED);
  for (const char* at = list; at != NULL && (at = strstr(at, what)) != NULL; at += length) {
    if (at != list && at[-1] != ' ') continue;
    const char* end = at + length;
    int error = ENOTSUP;
    if (*end == '@') {
      if (strtol(end + 1, (char**)&end, 10) != call) continue;
    }
    if (*end == ':') error = (int)strtol(end + 1, (char**)&end, 10);
    if (*end != ' ' && *end != '\0') continue;
    if (error == 999) kill(getpid(), SIGKILL);
    __atomic_add_fetch(&refused_calls, 1, __ATOMIC_RELAXED);
    errno = error;
    return 1;
  }
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int open(const char* path, int flags, ...) {
  static int calls;
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = va_arg(rest, mode_t);
  va_end(rest);
  if ((flags & O_TMPFILE) == O_TMPFILE && refused("tmpfile", &calls)) return -1;
  return REAL(open)(path, flags, mode);
}

int fstatfs(int fd, struct statfs* found) {
  static int calls;
  const int status = REAL(fstatfs)(fd, found);
  if (status == 0 && refused("nfs", &calls)) found->f_type = 0x6969;
  return status;
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
  static int calls;
  return refused("fallocate", &calls) ? -1 : REAL(fallocate)(fd, mode, offset, length);
}

int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) {
  static int calls;
  return refused("exchange", &calls) ? -1 : REAL(renameat2)(from_dir, from, to_dir, to, flags);
}

int link(const char* from, const char* to) {
  static int calls;
  return refused("link", &calls) ? -1 : REAL(link)(from, to);
}

int linkat(int from_dir, const char* from, int to_dir, const char* to, int flags) {
  static int calls;
  return refused("linkat", &calls) ? -1 : REAL(linkat)(from_dir, from, to_dir, to, flags);
}

int unlink(const char* path) {
  static int calls;
  return refused("unlink", &calls) ? -1 : REAL(unlink)(path);
}

int sync_file_range(int fd, off_t offset, off_t nbytes, unsigned flags) {
  static int calls;
  static int late_calls;
  if (refused("range", &calls)) {
    const int error = errno;
    if (refused("late", &late_calls)) usleep(500000);
    errno = error;
    return -1;
  }
  return REAL(sync_file_range)(fd, offset, nbytes, flags);
}

int fsetxattr(int fd, const char* name, const void* value, size_t nbytes, int flags) {
  static int calls;
  return refused("xattr", &calls) ? -1 : REAL(fsetxattr)(fd, name, value, nbytes, flags);
}

int fchmod(int fd, mode_t mode) {
  static int calls;
  return refused("chmod", &calls) ? -1 : REAL(fchmod)(fd, mode);
}

int rename(const char* from, const char* to) {
  static int calls, pauses;
  if (refused("pause", &pauses)) usleep(500000);
  return refused("rename", &calls) ? -1 : REAL(rename)(from, to);
}

int statx(int folder, const char* path, int flags, unsigned mask, struct statx* found) {
  static int calls;
  return refused("statx", &calls) ? -1 : REAL(statx)(folder, path, flags, mask, found);
}

int fsync(int fd) {
  static int calls;
  return refused("fsync", &calls) ? -1 : REAL(fsync)(fd);
}

int fcntl(int fd, int command, ...) {
  static int calls, locks;
  va_list rest;
  va_start(rest, command);
  void* const argument = va_arg(rest, void*);
  va_end(rest);
  if ((command == F_OFD_SETLK || command == F_OFD_GETLK) && refused("locks", &locks)) return -1;
  if (command == F_SETFL && ((long)argument & O_DIRECT) != 0 && refused("direct", &calls)) return -1;
  return REAL(fcntl)(fd, command, argument);
}

ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
  static int calls, halves;
  if (refused("pwrite", &calls)) return -1;
  // Not a whole block, so that what is left must begin further in front.
  if (nbytes > 8192 && refused("short", &halves)) nbytes = nbytes / 8192 * 4096 + 512;
  return REAL(pwrite)(fd, data, nbytes, offset);
}

static int stores;

ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t offset) {
  static int calls, pauses, naps;
  if (refused("nap", &naps)) usleep(1000000);
  if (refused("slow", &pauses)) {
    const int wanted = errno;
    for (int i = 0; i < 5000 && __atomic_load_n(&stores, __ATOMIC_RELAXED) < wanted; ++i) usleep(1000);
  }
  return refused("pwritev", &calls) ? -1 : REAL(pwritev)(fd, parts, count, offset);
}

ssize_t process_vm_readv(pid_t pid, const struct iovec* local, unsigned long local_count, const struct iovec* remote,
                         unsigned long remote_count, unsigned long flags) {
  if (refused("readv", &stores)) return -1;
  return REAL(process_vm_readv)(pid, local, local_count, remote, remote_count, flags);
}

long syscall(long number, ...) {
  static int calls;
  va_list rest;
  va_start(rest, number);
  long a[6];
  for (int i = 0; i < 6; ++i) a[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_io_uring_setup && refused("io_uring", &calls)) return -1;
  return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
