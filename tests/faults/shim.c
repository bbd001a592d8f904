/* System calls that change what is on the disk below one directory: counted, listed, refused or fatal at the
   n-th. Loaded with LD_PRELOAD; a process arms it for itself (fault_arm), so that one warm interpreter can be
   forked many times.

       cc -shared -fPIC -O1 -o shim.so shim.c -ldl

   how: 0 counts; 1 dies before the n-th call; 2 dies in the middle of it, if it is a write, else after it;
   3 refuses it and all that follow with `error`, unlinks excepted (a full disk gives space back); 4 refuses
   only the n-th, after half of it if it is a write; 5 refuses every call whose path begins with the directory,
   reading ones too (the directory is not there). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int how = -1, error = EIO, list = -1;
static long at, seen;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *directory, int kind, long n, int number, const char *listing) {
    seen = 0, at = n, error = number;
    if (listing && *listing) list = open(listing, O_WRONLY | O_CREAT | O_APPEND, 0644);
    strncpy(root, directory, sizeof root - 1);
    how = kind;
}
/* For a program that cannot arm it: FAULT_GONE=/tmp takes that directory away from the start. */
__attribute__((constructor)) static void gone(void) {
    const char *directory = getenv("FAULT_GONE");
    if (directory) fault_arm(directory, 5, 0, ENOENT, NULL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    size_t n = strlen(root);
    return how >= 0 && n && path && !strncmp(path, root, n) && (!path[n] || path[n] == '/');
}
static const char *of(int fd, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = how < 0 || fd < 0 ? -1 : readlink(link, room, PATH_MAX - 1);
    return n < 0 ? NULL : (room[n] = 0, room);
}
static const char *joined(int dir, const char *path, char *room) {
    char folder[PATH_MAX];
    if (!path || path[0] == '/' || dir == AT_FDCWD || !of(dir, folder)) return path;
    snprintf(room, PATH_MAX, "%.2000s/%.2000s", folder, path);
    return room;
}
/* 0: go on; 1: refused (errno is set); 2: do half of it, then `after`. */
static int due(const char *name, const char *path, int writes, int gives) {
    if (!below(path)) return 0;
    if (how == 5) { errno = error; return 1; }
    pthread_mutex_lock(&one);
    long n = ++seen;
    if (list >= 0) {
        char line[PATH_MAX + 64];
        int m = snprintf(line, sizeof line, "%s %s\n", name, path);
        REAL(write)(list, line, m);
    }
    pthread_mutex_unlock(&one);
    if (how == 1 && n == at) kill(getpid(), SIGKILL);
    if (how == 2 && n == at) return 2;
    if (how == 3 && n >= at && !gives) { errno = error; return writes && n == at ? 2 : 1; }
    if (how == 4 && n == at) { errno = error; return writes ? 2 : 1; }
    return 0;
}
static void after(void) {
    if (how == 2) kill(getpid(), SIGKILL);
    errno = error;
}

#define WRITES (O_CREAT | O_TRUNC)
#define OPEN(name)                                                                                            \
    int name(const char *path, int flags, ...) {                                                              \
        va_list more;                                                                                         \
        va_start(more, flags);                                                                                \
        int mode = flags & O_CREAT ? va_arg(more, int) : 0;                                                   \
        va_end(more);                                                                                         \
        int d = flags & WRITES || how == 5 ? due("open", path, 0, 0) : 0;                                     \
        if (d == 1) return -1;                                                                                \
        int got = REAL(name)(path, flags, mode);                                                              \
        if (d == 2) after();                                                                                  \
        return got;                                                                                           \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                                          \
    int name(int dir, const char *path, int flags, ...) {                                                     \
        char room[PATH_MAX];                                                                                  \
        va_list more;                                                                                         \
        va_start(more, flags);                                                                                \
        int mode = flags & O_CREAT ? va_arg(more, int) : 0;                                                   \
        va_end(more);                                                                                         \
        int d = flags & WRITES || how == 5 ? due("open", joined(dir, path, room), 0, 0) : 0;                  \
        if (d == 1) return -1;                                                                                \
        int got = REAL(name)(dir, path, flags, mode);                                                         \
        if (d == 2) after();                                                                                  \
        return got;                                                                                           \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) {
    char room[PATH_MAX];
    int d = how < 0 || fd < 3 ? 0 : due("write", of(fd, room), 1, 0);
    if (d == 1) return -1;
    if (d == 2) {
        REAL(write)(fd, data, n / 2);
        after();
        return -1;
    }
    return REAL(write)(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    char room[PATH_MAX];
    int d = how < 0 || fd < 3 ? 0 : due("write", of(fd, room), 1, 0);
    if (d == 1) return -1;
    if (d == 2) {
        REAL(writev)(fd, parts, n / 2);
        after();
        return -1;
    }
    return REAL(writev)(fd, parts, n);
}
#define CALL(type, name, declared, given, label, path, gives)                                                 \
    type name declared {                                                                                      \
        char room[PATH_MAX];                                                                                  \
        (void)room;                                                                                           \
        int d = how < 0 ? 0 : due(label, path, 0, gives);                                                     \
        if (d == 1) return -1;                                                                                \
        type got = REAL(name) given;                                                                          \
        if (d == 2) after();                                                                                  \
        return got;                                                                                           \
    }
CALL(int, fsync, (int fd), (fd), "fsync", of(fd, room), 0)
CALL(int, fdatasync, (int fd), (fd), "fsync", of(fd, room), 0)
CALL(int, ftruncate, (int fd, off_t n), (fd, n), "truncate", of(fd, room), 0)
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n), "truncate", of(fd, room), 0)
CALL(int, truncate, (const char *path, off_t n), (path, n), "truncate", path, 0)
CALL(int, truncate64, (const char *path, off64_t n), (path, n), "truncate", path, 0)
CALL(int, rename, (const char *a, const char *b), (a, b), "rename", b, 0)
CALL(int, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), "rename", joined(y, b, room), 0)
CALL(int, unlink, (const char *path), (path), "unlink", path, 1)
CALL(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), "unlink",
     joined(dir, path, room), 1)
CALL(int, rmdir, (const char *path), (path), "rmdir", path, 1)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), "mkdir", path, 0)
CALL(int, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), "mkdir",
     joined(dir, path, room), 0)
