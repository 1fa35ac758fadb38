/* Start and end, the cards, the contexts, versions and capabilities. */
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CANN_VERSION "9.1.0"
#define NO_CARD (-1)

static __thread int thread_card = NO_CARD;
static __thread char last_error[512];

aclError refuse(aclError code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

EXPORT const char *aclGetRecentErrMsg(void) { return last_error; }

static int installed_cards(void) {
    const char *text = getenv("NPU_SIM_CARDS");
    int cards = text ? atoi(text) : 2;
    return cards < 0 ? 0 : cards > MAX_CARDS ? MAX_CARDS : cards;
}

/* As the driver does: ascending numbers of cards; the list ends at the first that is not one. */
static int visible_cards(void) {
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int installed = installed_cards();
    if (list == NULL) return installed;
    int count = 0;
    long last = -1;
    for (char *end; *list; list = *end == ',' ? end + 1 : end) {
        long card = strtol(list, &end, 10);
        if (end == list || card <= last || card >= installed) break;
        last = card;
        count++;
    }
    return count;
}

EXPORT aclError aclInit(const char *config) {
    (void)config;
    return ACL_SUCCESS;
}

EXPORT aclError aclFinalize(void) { return ACL_SUCCESS; }

EXPORT aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = (uint32_t)visible_cards();
    return ACL_SUCCESS;
}

int current_card(void) { return thread_card == NO_CARD ? 0 : thread_card; }

EXPORT aclError aclrtGetDevice(int32_t *card) {
    if (thread_card == NO_CARD) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, "this thread has no context; set a device first");
    }
    *card = thread_card;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSetDevice(int32_t card) {
    if (card < 0 || card >= visible_cards()) {
        return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", card);
    }
    thread_card = card;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtResetDevice(int32_t card) {
    (void)card;
    return ACL_SUCCESS;
}

/* A context is no more than the number of its card; NULL is none, so numbers start at one. */
EXPORT aclError aclrtGetCurrentContext(aclrtContext *context) {
    if (thread_card == NO_CARD) {
        return refuse(ACL_ERROR_RT_CONTEXT_NULL, "this thread has no context; set a device first");
    }
    *context = (aclrtContext)(intptr_t)(thread_card + 1);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
    if (context == NULL) return refuse(ACL_ERROR_RT_PARAM_INVALID, "the context is NULL");
    thread_card = (int)(intptr_t)context - 1;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetPrimaryCtxState(int32_t card, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = card == thread_card;
    return ACL_SUCCESS;
}

EXPORT const char *aclrtGetSocName(void) { return "Ascend910B2"; }

EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t card, int32_t peer) {
    *can = card != peer;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    (void)peer, (void)flags;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDeviceGetBareTgid(int32_t *pid) {
    *pid = getpid();
    return ACL_SUCCESS;
}

static int64_t capability(int what) {
    switch (what) {
        case ACL_DEVICE_INFO_AI_CORE_NUM: return 24;
        case ACL_DEVICE_INFO_VECTOR_CORE_NUM: return 48;
        case ACL_DEVICE_INFO_L2_SIZE: return (int64_t)192 << 20;
        default: return 0;
    }
}

EXPORT aclError aclGetDeviceCapability(uint32_t card, aclDeviceInfo what, int64_t *value) {
    (void)card;
    *value = capability(what);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDeviceInfo(uint32_t card, aclrtDevAttr what, int64_t *value) {
    (void)card;
    switch (what) {
        case ACL_DEV_ATTR_AICORE_CORE_NUM:
        case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = capability(ACL_DEVICE_INFO_AI_CORE_NUM); break;
        case ACL_DEV_ATTR_VECTOR_CORE_NUM:
            *value = capability(ACL_DEVICE_INFO_VECTOR_CORE_NUM);
            break;
        case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = capability(ACL_DEVICE_INFO_L2_SIZE); break;
        case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = (int64_t)card_bytes(); break;
        default: return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "no device attribute %d", what);
    }
    return ACL_SUCCESS;
}

/* torch_npu asks which CANN it runs on to decide which of its ways to take. */
EXPORT aclError aclsysGetVersionStr(char *package, char *version) {
    (void)package;
    strcpy(version, CANN_VERSION);
    return ACL_SUCCESS;
}

EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion *version) {
    (void)package;
    memset(version, 0, sizeof *version);
    strcpy(version->version, CANN_VERSION);
    return ACL_SUCCESS;
}

/* Options such as determinism, which torch_npu sets and reads back before it starts an operator. */
#define OPTIONS 16
static int64_t options[OPTIONS];

EXPORT aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    if ((unsigned)option >= OPTIONS) {
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "there is no option %d", option);
    }
    options[option] = value;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    if ((unsigned)option >= OPTIONS) {
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "there is no option %d", option);
    }
    *value = options[option];
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    return aclrtSetSysParamOpt(option, value);
}

EXPORT aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    return aclrtGetSysParamOpt(option, value);
}
