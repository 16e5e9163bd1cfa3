/* Stops a process at one of its changes to files below a folder, or refuses them from there on.

   Loaded with LD_PRELOAD, it does nothing until arm() is called. `before_kill` counts down at every change: opening a
   file to write, writing, cutting, renaming, linking, unlinking, making and removing folders, syncing. At zero the
   process gets SIGKILL; a write is made by half before that. With an error number, changes that need room fail with
   it from there on instead (a full disk). `seen` is the number of changes so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX];
static long left = -1;
static int failure;
long seen;

void arm(const char *folder, long before_kill, int error) {
    snprintf(place, sizeof place, "%s", folder);
    seen = 0;
    failure = error;
    __atomic_store_n(&left, before_kill, __ATOMIC_SEQ_CST);
}

static int below(const char *path) { return place[0] && !strncmp(path, place, strlen(place)); }

static int names(int folder, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (!place[0] || !path) return 0;
    if (path[0] == '/') return below(path);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, full, PATH_MAX - 1);
    if (length < 0) return 0;
    snprintf(full + length, PATH_MAX, "/%s", path);
    return below(full);
}

static int holds(int file) {
    char path[PATH_MAX], link[64];
    if (!place[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* 0: go on. -1: fail, errno is set. 1: the last change, which is killed. */
static int change(int needs_room) {
    __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    long now = __atomic_load_n(&left, __ATOMIC_SEQ_CST);
    if (now < 0) return 0;
    if (now > 0) now = __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST);
    if (now > 0) return 0;
    if (!failure) return 1;
    if (!needs_room) return 0;
    errno = failure;
    return -1;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define STEP(ours, needs_room) \
    if (ours) { \
        int told = change(needs_room); \
        if (told > 0) die(); \
        if (told < 0) return -1; \
    }

#define OPEN(name, folder, first, ...) \
    int name(first const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        int writes = (flags & O_ACCMODE) != O_RDONLY; \
        STEP(writes && names(folder, path), flags & O_CREAT) \
        return real(__VA_ARGS__ path, flags, mode); \
    }
#define NOTHING
OPEN(open, AT_FDCWD, NOTHING, NOTHING)
OPEN(open64, AT_FDCWD, NOTHING, NOTHING)
#define FIRST int folder,
#define GIVEN folder,
OPEN(openat, folder, FIRST, GIVEN)
OPEN(openat64, folder, FIRST, GIVEN)

#define WRITE(name, arguments, half, ...) \
    ssize_t name arguments { \
        REAL(name); \
        if (holds(file)) { \
            int told = change(1); \
            if (told < 0) return -1; \
            if (told > 0) { \
                half; \
                die(); \
            } \
        } \
        return real(__VA_ARGS__); \
    }
WRITE(write, (int file, const void *from, size_t count), if (count > 1) real(file, from, count / 2), file, from, count)
WRITE(pwrite, (int file, const void *from, size_t count, off_t at), if (count > 1) real(file, from, count / 2, at),
      file, from, count, at)
WRITE(pwrite64, (int file, const void *from, size_t count, off64_t at), if (count > 1) real(file, from, count / 2, at),
      file, from, count, at)
WRITE(writev, (int file, const struct iovec *parts, int count), if (count > 1) real(file, parts, count / 2), file, parts,
      count)

#define CALL(name, arguments, ours, needs_room, ...) \
    int name arguments { \
        REAL(name); \
        STEP(ours, needs_room) \
        return real(__VA_ARGS__); \
    }
CALL(ftruncate, (int file, off_t size), holds(file), 1, file, size)
CALL(ftruncate64, (int file, off64_t size), holds(file), 1, file, size)
CALL(fsync, (int file), holds(file), 0, file)
CALL(fdatasync, (int file), holds(file), 0, file)
CALL(mkdir, (const char *path, mode_t mode), names(AT_FDCWD, path), 1, path, mode)
CALL(mkdirat, (int folder, const char *path, mode_t mode), names(folder, path), 1, folder, path, mode)
CALL(rmdir, (const char *path), names(AT_FDCWD, path), 0, path)
CALL(unlink, (const char *path), names(AT_FDCWD, path), 0, path)
CALL(unlinkat, (int folder, const char *path, int flags), names(folder, path), 0, folder, path, flags)
CALL(rename, (const char *from, const char *to), names(AT_FDCWD, to), 0, from, to)
CALL(renameat, (int one, const char *from, int two, const char *to), names(two, to), 0, one, from, two, to)
CALL(renameat2, (int one, const char *from, int two, const char *to, unsigned int flags), names(two, to), 0, one, from,
     two, to, flags)
CALL(link, (const char *from, const char *to), names(AT_FDCWD, to), 1, from, to)
CALL(linkat, (int one, const char *from, int two, const char *to, int flags), names(two, to), 1, one, from, two, to,
     flags)
CALL(chmod, (const char *path, mode_t mode), names(AT_FDCWD, path), 0, path, mode)
