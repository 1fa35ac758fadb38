/* The profiler's ways in: it starts, warms up and stops for real, and measures nothing on the
 * device. torch_npu's own part, the host's times of operators and calls, is real. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Start without init, or stop without start, are torch_npu's mistakes that CANN would refuse. */
static enum { CLOSED, OPEN, RUNNING } state = CLOSED;

static aclError go(int from, int to, const char *call) {
    if ((int)state != from) {
        return refuse(ACL_ERROR_PROFILING_FAILURE, "%s is not possible in state %d", call, state);
    }
    state = to;
    return ACL_SUCCESS;
}

EXPORT aclError aclprofInit(const char *path, size_t length) {
    if (path == NULL || length == 0) {
        return refuse(ACL_ERROR_INVALID_PARAM, "the profiler needs a directory");
    }
    return go(CLOSED, OPEN, "aclprofInit");
}

EXPORT aclError aclprofStart(const aclprofConfig *config) {
    (void)config;
    return go(OPEN, RUNNING, "aclprofStart");
}

EXPORT aclError aclprofStop(const aclprofConfig *config) {
    (void)config;
    return go(RUNNING, OPEN, "aclprofStop");
}

EXPORT aclError aclprofFinalize(void) { return go(OPEN, CLOSED, "aclprofFinalize"); }

EXPORT aclError aclprofWarmup(const aclprofConfig *config) {
    (void)config;
    return ACL_SUCCESS;
}

EXPORT aclprofConfig *aclprofCreateConfig(uint32_t *cards, uint32_t count,
    aclprofAicoreMetrics metrics, const aclprofAicoreEvents *events, uint64_t switches) {
    (void)cards, (void)count, (void)metrics, (void)events, (void)switches;
    return malloc(1);
}

EXPORT aclError aclprofDestroyConfig(const aclprofConfig *config) {
    free((void *)config);
    return ACL_SUCCESS;
}

EXPORT aclError aclprofSetConfig(aclprofConfigType type, const char *value, size_t length) {
    (void)type, (void)value, (void)length;
    return ACL_SUCCESS;
}

EXPORT aclprofStepInfo *aclprofCreateStepInfo(void) { return malloc(1); }

EXPORT void aclprofDestroyStepInfo(aclprofStepInfo *step) { free(step); }

EXPORT aclError aclprofGetStepTimestamp(
    aclprofStepInfo *step, aclprofStepTag tag, aclrtStream stream) {
    (void)step, (void)tag, (void)stream;
    return ACL_SUCCESS;
}

EXPORT aclError aclprofMarkEx(const char *message, size_t length, aclrtStream stream) {
    (void)message, (void)length, (void)stream;
    return ACL_SUCCESS;
}

/* The names of calls and operators go to the profiler as hashes; FNV-1a is as good as any. */
EXPORT uint64_t MsprofGetHashId(const char *text, size_t length) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    return hash;
}

/* The device's clock is the host's. */
EXPORT uint64_t MsprofSysCycleTime(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
