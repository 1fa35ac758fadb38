/* Streams and events. Everything has been done when its call returns, so waiting is never needed;
 * an event remembers when it was recorded, for elapsed times. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    int32_t number;
} Stream;

typedef struct {
    struct timespec when;
} Event;

EXPORT aclError aclrtCreateStream(aclrtStream *stream) {
    static atomic_int streams;
    Stream *made = malloc(sizeof *made);
    made->number = atomic_fetch_add(&streams, 1);
    *stream = made;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    return aclrtCreateStream(stream);
}

EXPORT aclError aclrtDestroyStream(aclrtStream stream) {
    free(stream);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

EXPORT aclError aclrtStreamGetId(aclrtStream stream, int32_t *number) {
    *number = ((Stream *)stream)->number;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    (void)stream;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateEvent(aclrtEvent *event) {
    *event = calloc(1, sizeof(Event));
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    return aclrtCreateEvent(event);
}

EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    return aclrtCreateEvent(event);
}

EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
    free(event);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->when);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    (void)event;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    const struct timespec *from = &((Event *)start)->when;
    const struct timespec *to = &((Event *)end)->when;
    *ms = (to->tv_sec - from->tv_sec) * 1e3f + (to->tv_nsec - from->tv_nsec) / 1e6f;
    return ACL_SUCCESS;
}

/* A function that the host shall run when the stream gets there: that is now. */
EXPORT aclError aclrtLaunchCallback(
    aclrtCallback function, void *data, aclrtCallbackBlockType block, aclrtStream stream) {
    (void)block, (void)stream;
    function(data);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *data) {
    (void)stream;
    function(data);
    return ACL_SUCCESS;
}

/* torch_npu asks before many calls whether the stream is being captured as a graph. */
EXPORT aclError aclmdlRICaptureGetInfo(
    aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *model) {
    (void)stream;
    *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (model) *model = NULL;
    return ACL_SUCCESS;
}
