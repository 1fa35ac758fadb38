/* Shared by the sources of the stand-in libhccl.so: collectives of a few processes of one machine.
 *
 * HCCL's own headers are C++, so what is needed of them is declared here. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_RANKS 8

typedef enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_REMOTE = 21,
} HcclResult;

typedef enum {
    HCCL_DATA_TYPE_INT8 = 0,
    HCCL_DATA_TYPE_INT16 = 1,
    HCCL_DATA_TYPE_INT32 = 2,
    HCCL_DATA_TYPE_FP16 = 3,
    HCCL_DATA_TYPE_FP32 = 4,
    HCCL_DATA_TYPE_INT64 = 5,
    HCCL_DATA_TYPE_UINT64 = 6,
    HCCL_DATA_TYPE_UINT8 = 7,
    HCCL_DATA_TYPE_UINT16 = 8,
    HCCL_DATA_TYPE_UINT32 = 9,
    HCCL_DATA_TYPE_FP64 = 10,
    HCCL_DATA_TYPE_BFP16 = 11,
} HcclDataType;

typedef enum {
    HCCL_REDUCE_SUM = 0,
    HCCL_REDUCE_PROD = 1,
    HCCL_REDUCE_MAX = 2,
    HCCL_REDUCE_MIN = 3,
} HcclReduceOp;

/* One rank's end of a communicator (hccl_link.c). */
typedef struct Link Link;

/* What goes to or comes from one rank in one operation. */
typedef struct {
    char *data;
    size_t bytes;
} Piece;

/* Meets the other ranks under the name that rank 0 made up; waits for all of them. */
HcclResult link_open(const char *name, uint32_t ranks, uint32_t rank, Link **link);
void link_close(Link *link);
uint32_t link_ranks(const Link *link);
uint32_t link_rank(const Link *link);

/* Sends out[r] to and receives in[r] from each rank r, all at the same time and in any order, so
 * that no order of ranks can block. Fails when a rank has died or nothing moved for too long. */
HcclResult link_exchange(Link *link, const Piece out[MAX_RANKS], const Piece in[MAX_RANKS]);

/* Bytes of one element, or 0 for a type that HCCL does not carry (hccl_types.c). */
size_t type_bytes(HcclDataType type);

/* Whether HCCL reduces elements of this type in this way. */
int can_reduce(HcclDataType type, HcclReduceOp how);

/* sum[i] = how(sum[i], other[i]), each rounded to the type as the devices do. */
void reduce_into(void *sum, const void *other, size_t count, HcclDataType type, HcclReduceOp how);
