/* What HCCL carries and reduces on Atlas A2, and the arithmetic of it. */
#include "hccl.h"

#include <string.h>

size_t type_bytes(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_UINT64:
        case HCCL_DATA_TYPE_FP64: return 8;
    }
    return 0;
}

int can_reduce(HcclDataType type, HcclReduceOp how) {
    switch (type) {
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_BFP16: return how != HCCL_REDUCE_PROD;
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_FP32: return how <= HCCL_REDUCE_MIN;
        default: return 0;
    }
}

static float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounds to the nearest, ties to even; NaN keeps a bit that says so. */
static uint16_t to_bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) return (uint16_t)(wide >> 16 | 0x40);
    return (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

#define COMBINE(a, b)                       \
    (how == HCCL_REDUCE_SUM    ? (a) + (b)  \
     : how == HCCL_REDUCE_PROD ? (a) * (b)  \
     : how == HCCL_REDUCE_MAX  ? ((a) > (b) ? (a) : (b)) \
                               : ((a) < (b) ? (a) : (b)))

#define REDUCE_AS(element)                                               \
    do {                                                                 \
        element *to = sum;                                               \
        const element *from = other;                                     \
        for (size_t i = 0; i < count; i++) to[i] = (element)COMBINE(to[i], from[i]); \
    } while (0)

static void reduce_bfloat16(uint16_t *to, const uint16_t *from, size_t count, HcclReduceOp how) {
    for (size_t i = 0; i < count; i++) {
        float a = from_bfloat16(to[i]), b = from_bfloat16(from[i]);
        to[i] = to_bfloat16(COMBINE(a, b));
    }
}

void reduce_into(void *sum, const void *other, size_t count, HcclDataType type, HcclReduceOp how) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: REDUCE_AS(int8_t); break;
        case HCCL_DATA_TYPE_INT16: REDUCE_AS(int16_t); break;
        case HCCL_DATA_TYPE_INT32: REDUCE_AS(int32_t); break;
        case HCCL_DATA_TYPE_INT64: REDUCE_AS(int64_t); break;
        case HCCL_DATA_TYPE_FP16: REDUCE_AS(_Float16); break;
        case HCCL_DATA_TYPE_FP32: REDUCE_AS(float); break;
        case HCCL_DATA_TYPE_BFP16: reduce_bfloat16(sum, other, count, how); break;
        default: break; /* can_reduce refused it */
    }
}
