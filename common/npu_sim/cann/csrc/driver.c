/* The driver's library, which the profiler asks for the device's clock. An old driver has none
 * that it could use, so that it takes the host's clock. */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define NOT_SUPPORTED 0xfffe

EXPORT int32_t halGetAPIVersion(int32_t *version) {
    *version = 0;
    return 0;
}

EXPORT int32_t halGetDeviceInfo(uint32_t card, int32_t module, int32_t what, int64_t *value) {
    (void)card, (void)module, (void)what, (void)value;
    return NOT_SUPPORTED;
}
