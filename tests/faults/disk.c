/* A disk that fails on demand, preloaded into a process; disk.py builds it and says what to do.
 *
 * It stands before libc's functions that touch files. Calls about paths below one directory are
 * counted, and from a given one on the process is killed, or the call fails, writes less than it
 * was given, or takes its time. The text that says so, in ZOO_DISK or given to disk_arm(), has a
 * "key=value" in each line; what the keys mean stands in disk.py.
 */
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
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_PATHS 8192
#define NEXT(name) ((__typeof__(&name))next(#name))

enum deed { NOTHING, KILL, FAIL, SHORT, TEAR, STALL };

static struct {
    char under[PATH_MAX], name[256], calls[256], trace[PATH_MAX], only_while[PATH_MAX];
    long at, times, each;
    long long free_bytes;
    double seconds;
    enum deed deed;
    int error;
} rule;
static long counted;
static struct {
    unsigned long hash;
    long count;
} paths[MOST_PATHS];
static pthread_mutex_t paths_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t ready = PTHREAD_ONCE_INIT;

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void take(const char *key, const char *value) {
    static const struct {
        const char *name;
        int number;
    } errors[] = {{"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT},       {"EROFS", EROFS},
                  {"EIO", EIO},       {"ESTALE", ESTALE},       {"ETIMEDOUT", ETIMEDOUT},
                  {"EPERM", EPERM},   {"EREMOTEIO", EREMOTEIO}, {"EOPNOTSUPP", EOPNOTSUPP}};
    static const struct {
        const char *name;
        enum deed deed;
    } deeds[] = {{"nothing", NOTHING}, {"kill", KILL}, {"short", SHORT},
                 {"tear", TEAR},       {"stall", STALL}};

    if (!strcmp(key, "under")) copy(rule.under, sizeof rule.under, value);
    if (!strcmp(key, "name")) copy(rule.name, sizeof rule.name, value);
    if (!strcmp(key, "trace")) copy(rule.trace, sizeof rule.trace, value);
    if (!strcmp(key, "only_while")) copy(rule.only_while, sizeof rule.only_while, value);
    if (!strcmp(key, "calls")) snprintf(rule.calls, sizeof rule.calls, ",%s,", value);
    if (!strcmp(key, "at")) rule.at = atol(value);
    if (!strcmp(key, "times")) rule.times = atol(value);
    if (!strcmp(key, "each")) rule.each = atol(value);
    if (!strcmp(key, "free_bytes")) rule.free_bytes = atoll(value);
    if (!strcmp(key, "seconds")) rule.seconds = atof(value);
    if (strcmp(key, "do"))
        return;
    for (size_t i = 0; i < sizeof deeds / sizeof *deeds; i++)
        if (!strcmp(value, deeds[i].name)) rule.deed = deeds[i].deed;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(value, errors[i].name)) {
            rule.deed = FAIL;
            rule.error = errors[i].number;
        }
}

/* Takes a new text and counts from 0; the process has one thread that uses files meanwhile. */
static void set_rule(const char *text) {
    memset(&rule, 0, sizeof rule);
    memset(paths, 0, sizeof paths);
    counted = 0;
    rule.at = rule.times = 1;
    rule.free_bytes = -1;
    char *all = strdup(text), *rest = NULL;
    for (char *line = strtok_r(all, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *equals = strchr(line, '=');
        if (equals) {
            *equals = 0;
            take(line, equals + 1);
        }
    }
    free(all);
}

static void set_first_rule(void) {
    const char *text = getenv("ZOO_DISK");
    set_rule(text ? text : "");
}

void disk_arm(const char *text) {
    pthread_once(&ready, set_first_rule);
    set_rule(text);
}

long disk_calls(void) { return __atomic_load_n(&counted, __ATOMIC_SEQ_CST); }

static void path_of(int fd, char *to) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, to, PATH_MAX - 1);
    to[length < 0 ? 0 : length] = 0;
}

static void absolute(int directory, const char *path, char *to) {
    char base[PATH_MAX];
    if (path[0] == '/') {
        copy(to, PATH_MAX, path);
        return;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            base[0] = 0;
    } else {
        path_of(directory, base);
    }
    if (snprintf(to, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        to[0] = 0;
}

static int is_meant(const char *path) {
    size_t length = strlen(rule.under);
    return length && !strncmp(path, rule.under, length) &&
           (path[length] == '/' || path[length] == 0) && strstr(path, rule.name);
}

static long count_of_path(const char *path) {
    unsigned long hash = 5381;
    for (const char *c = path; *c; c++)
        hash = hash * 33 + (unsigned char)*c;
    long count = 0;
    pthread_mutex_lock(&paths_lock);
    for (unsigned long i = 0; i < MOST_PATHS && !count; i++) {
        unsigned long slot = (hash + i) % MOST_PATHS;
        if (paths[slot].count == 0 || paths[slot].hash == hash) {
            paths[slot].hash = hash;
            count = ++paths[slot].count;
        }
    }
    pthread_mutex_unlock(&paths_lock);
    return count;
}

static void note(const char *call, const char *path, long number) {
    int fd = NEXT(open)(rule.trace, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd < 0)
        return;
    dprintf(fd, "%ld %s %s\n", number, call, path);
    NEXT(close)(fd);
}

static void sleep_for(double seconds) {
    struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left) && errno == EINTR) {
    }
}

/* What to do at this call: -1 with errno set, else how many of its bytes to write. */
static ssize_t meet(const char *call, const char *path, size_t bytes) {
    char listed[64];
    pthread_once(&ready, set_first_rule);
    snprintf(listed, sizeof listed, ",%s,", call);
    if (!is_meant(path) || (rule.calls[0] && !strstr(rule.calls, listed)))
        return (ssize_t)bytes;
    if (rule.only_while[0] && access(rule.only_while, F_OK))
        return (ssize_t)bytes;
    long number = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (rule.each)
        number = count_of_path(path);
    if (rule.trace[0])
        note(call, path, number);
    if (number < rule.at || (rule.times && number >= rule.at + rule.times))
        return (ssize_t)bytes;
    switch (rule.deed) {
    case KILL:
        kill(getpid(), SIGKILL);
        pause();
        break;
    case FAIL:
        errno = rule.error;
        return -1;
    case SHORT:
    case TEAR:
        return (ssize_t)(bytes > 1 ? bytes / 2 : bytes);
    case STALL:
        sleep_for(rule.seconds);
        break;
    case NOTHING:
        break;
    }
    return (ssize_t)bytes;
}

static ssize_t written(ssize_t result, size_t asked, size_t bytes) {
    if (asked < bytes && rule.deed == TEAR) {
        kill(getpid(), SIGKILL);
        pause();
    }
    return result;
}

/* Calls about open files. */

#define ON_FILE(name)                                                                              \
    int name(int fd) {                                                                             \
        char path[PATH_MAX];                                                                       \
        path_of(fd, path);                                                                         \
        if (meet(#name, path, 0) < 0) {                                                            \
            int error = errno;                                                                     \
            if (!strcmp(#name, "close"))                                                           \
                NEXT(name)(fd); /* as Linux does: it is closed all the same */                     \
            errno = error;                                                                         \
            return -1;                                                                             \
        }                                                                                          \
        return NEXT(name)(fd);                                                                     \
    }
ON_FILE(fsync)
ON_FILE(fdatasync)
ON_FILE(close)

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    path_of(fd, path);
    ssize_t asked = meet("write", path, size);
    return asked < 0 ? -1 : written(NEXT(write)(fd, data, (size_t)asked), (size_t)asked, size);
}

ssize_t read(int fd, void *data, size_t size) {
    char path[PATH_MAX];
    path_of(fd, path);
    ssize_t asked = meet("read", path, size);
    return asked < 0 ? -1 : NEXT(read)(fd, data, (size_t)asked);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    char path[PATH_MAX];
    path_of(fd, path);
    ssize_t asked = meet("read", path, size);
    return asked < 0 ? -1 : NEXT(pread64)(fd, data, (size_t)asked, offset);
}

ssize_t readv(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    path_of(fd, path);
    return meet("read", path, 0) < 0 ? -1 : NEXT(readv)(fd, parts, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    path_of(fd, path);
    return meet("write", path, 0) < 0 ? -1 : NEXT(writev)(fd, parts, count);
}

int ftruncate64(int fd, off64_t size) {
    char path[PATH_MAX];
    path_of(fd, path);
    return meet("ftruncate", path, 0) < 0 ? -1 : NEXT(ftruncate64)(fd, size);
}

/* Calls about paths. */

static mode_t mode_in(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                                                                 \
    int name(const char *given, int flags, ...) {                                                  \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = mode_in(flags, rest);                                                        \
        va_end(rest);                                                                              \
        char path[PATH_MAX];                                                                       \
        absolute(AT_FDCWD, given, path);                                                           \
        return meet("open", path, 0) < 0 ? -1 : NEXT(name)(given, flags, mode);                    \
    }
OPEN(open)
OPEN(open64)

#define OPEN_AT(name)                                                                              \
    int name(int directory, const char *given, int flags, ...) {                                   \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = mode_in(flags, rest);                                                        \
        va_end(rest);                                                                              \
        char path[PATH_MAX];                                                                       \
        absolute(directory, given, path);                                                          \
        return meet("open", path, 0) < 0 ? -1 : NEXT(name)(directory, given, flags, mode);         \
    }
OPEN_AT(openat)
OPEN_AT(openat64)

#define OPEN_STREAM(name)                                                                          \
    FILE *name(const char *given, const char *mode) {                                              \
        char path[PATH_MAX];                                                                       \
        absolute(AT_FDCWD, given, path);                                                           \
        return meet("open", path, 0) < 0 ? NULL : NEXT(name)(given, mode);                         \
    }
OPEN_STREAM(fopen)
OPEN_STREAM(fopen64)

int unlink(const char *given) {
    char path[PATH_MAX];
    absolute(AT_FDCWD, given, path);
    return meet("unlink", path, 0) < 0 ? -1 : NEXT(unlink)(given);
}

int unlinkat(int directory, const char *given, int flags) {
    char path[PATH_MAX];
    absolute(directory, given, path);
    return meet("unlink", path, 0) < 0 ? -1 : NEXT(unlinkat)(directory, given, flags);
}

int mkdir(const char *given, mode_t mode) {
    char path[PATH_MAX];
    absolute(AT_FDCWD, given, path);
    return meet("mkdir", path, 0) < 0 ? -1 : NEXT(mkdir)(given, mode);
}

/* A call about two paths is one about the new one. */
#define ON_TWO(name)                                                                               \
    int name(const char *from, const char *to) {                                                   \
        char path[PATH_MAX];                                                                       \
        absolute(AT_FDCWD, to, path);                                                              \
        return meet(#name, path, 0) < 0 ? -1 : NEXT(name)(from, to);                               \
    }
ON_TWO(rename)
ON_TWO(symlink)
ON_TWO(link)

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags) {
    char path[PATH_MAX];
    absolute(to_directory, to, path);
    return meet("link", path, 0) < 0
               ? -1
               : NEXT(linkat)(from_directory, from, to_directory, to, flags);
}

int statvfs64(const char *given, struct statvfs64 *facts) {
    char path[PATH_MAX];
    absolute(AT_FDCWD, given, path);
    if (meet("statvfs", path, 0) < 0)
        return -1;
    int result = NEXT(statvfs64)(given, facts);
    if (!result && rule.free_bytes >= 0 && is_meant(path))
        facts->f_bavail = facts->f_bfree = (fsblkcnt64_t)(rule.free_bytes / facts->f_frsize);
    return result;
}
