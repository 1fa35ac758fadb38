/* HCCL's functions, as exchanges of pieces between the ranks; each has ended when it returns. */
#define _GNU_SOURCE
#include "hccl.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ROOT_INFO_BYTES 4108
#define NAME_BYTES 128
#define CONFIG_NAME_OFFSET 32 /* after 24 bytes of its own, the buffer size and determinism */
#define CONFIG_CAPABILITIES 12 /* as many as torch_npu 2.14 knows of */
#define REDUCED_AT_ONCE ((size_t)1 << 18) /* elements: bounds the memory that a reduction takes */

typedef void *Stream; /* everything runs in the caller's thread, so streams do not matter */

typedef struct {
    Link *link;
    char name[NAME_BYTES];
    pthread_mutex_t busy; /* operations of a communicator run one after another */
} Communicator;

/* What the real library answers with a code, and with the reason in its log. */
static HcclResult refuse(const char *call, const char *what, int value) {
    fprintf(stderr, "stand-in HCCL: %s does not support %s %d.\n", call, what, value);
    return HCCL_E_NOT_SUPPORT;
}

EXPORT const char *HcclGetErrorString(HcclResult code) {
    switch (code) {
        case HCCL_SUCCESS: return "no error";
        case HCCL_E_PARA: return "parameter error";
        case HCCL_E_NOT_SUPPORT: return "not supported";
        case HCCL_E_SYSCALL: return "a system call failed";
        case HCCL_E_TIMEOUT: return "timeout, the other ranks did nothing";
        case HCCL_E_REMOTE: return "a rank has died";
    }
    return "unknown error";
}

/* The name under which the ranks of a communicator meet; torch_npu hands it to all of them. */
EXPORT HcclResult HcclGetRootInfo(char *root_info) {
    static atomic_int made;
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    memset(root_info, 0, ROOT_INFO_BYTES);
    snprintf(root_info, NAME_BYTES, "/npu_sim_hccl_%d_%d_%ld", getpid(),
        atomic_fetch_add(&made, 1), time.tv_nsec);
    return HCCL_SUCCESS;
}

EXPORT uint32_t HcclGetCommConfigCapability(void) { return CONFIG_CAPABILITIES; }

EXPORT HcclResult HcclCommInitRootInfo(
    uint32_t ranks, const char *root_info, uint32_t rank, Communicator **made) {
    Communicator *communicator = calloc(1, sizeof *communicator);
    pthread_mutex_init(&communicator->busy, NULL);
    snprintf(communicator->name, NAME_BYTES, "%s", root_info);
    HcclResult result = link_open(root_info, ranks, rank, &communicator->link);
    if (result) {
        free(communicator);
        return result;
    }
    *made = communicator;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const char *root_info, uint32_t rank,
    const char *config, Communicator **made) {
    HcclResult result = HcclCommInitRootInfo(ranks, root_info, rank, made);
    if (result == HCCL_SUCCESS && config[CONFIG_NAME_OFFSET]) {
        snprintf((*made)->name, NAME_BYTES, "%s", config + CONFIG_NAME_OFFSET);
    }
    return result;
}

EXPORT HcclResult HcclCommDestroy(Communicator *communicator) {
    link_close(communicator->link);
    free(communicator);
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetCommName(Communicator *communicator, char *name) {
    memcpy(name, communicator->name, NAME_BYTES);
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankSize(Communicator *communicator, uint32_t *ranks) {
    *ranks = link_ranks(communicator->link);
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankId(Communicator *communicator, uint32_t *rank) {
    *rank = link_rank(communicator->link);
    return HCCL_SUCCESS;
}

/* Failures are returned by the operation itself. */
EXPORT HcclResult HcclGetCommAsyncError(Communicator *communicator, HcclResult *error) {
    (void)communicator;
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

/* Sums are always added in the order of the ranks, whatever HCCL_DETERMINISTIC says. */
EXPORT HcclResult HcclSetConfig(int config, int32_t value) {
    (void)config, (void)value;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGroupStart(void) { return HCCL_SUCCESS; }

EXPORT HcclResult HcclGroupEnd(void) { return HCCL_SUCCESS; }

/* What one operation exchanges; a rank that is not mentioned gets and sends nothing. */
typedef struct {
    Piece out[MAX_RANKS];
    Piece in[MAX_RANKS];
} Exchange;

static HcclResult run(Communicator *communicator, const Exchange *exchange) {
    pthread_mutex_lock(&communicator->busy);
    HcclResult result = link_exchange(communicator->link, exchange->out, exchange->in);
    pthread_mutex_unlock(&communicator->busy);
    return result;
}

EXPORT HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root,
    Communicator *communicator, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    if (type_bytes(type) == 0) return refuse("HcclBroadcast", "data type", type);
    Exchange exchange = {0};
    if (link_rank(communicator->link) == root) {
        for (uint32_t rank = 0; rank < link_ranks(communicator->link); rank++) {
            if (rank != root) exchange.out[rank] = (Piece){data, bytes};
        }
    } else {
        exchange.in[root] = (Piece){data, bytes};
    }
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclScatter(void *from, void *to, uint64_t count, HcclDataType type,
    uint32_t root, Communicator *communicator, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    if (type_bytes(type) == 0) return refuse("HcclScatter", "data type", type);
    Exchange exchange = {0};
    exchange.in[root] = (Piece){to, bytes};
    if (link_rank(communicator->link) == root) {
        for (uint32_t rank = 0; rank < link_ranks(communicator->link); rank++) {
            exchange.out[rank] = (Piece){(char *)from + rank * bytes, bytes};
        }
    }
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclAllGather(void *from, void *to, uint64_t count, HcclDataType type,
    Communicator *communicator, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    if (type_bytes(type) == 0) return refuse("HcclAllGather", "data type", type);
    Exchange exchange = {0};
    for (uint32_t rank = 0; rank < link_ranks(communicator->link); rank++) {
        exchange.out[rank] = (Piece){from, bytes};
        exchange.in[rank] = (Piece){(char *)to + rank * bytes, bytes};
    }
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclAllGatherV(void *from, uint64_t count, void *to, const uint64_t *counts,
    const uint64_t *offsets, HcclDataType type, Communicator *communicator, Stream stream) {
    (void)stream;
    size_t size = type_bytes(type);
    if (size == 0) return refuse("HcclAllGatherV", "data type", type);
    Exchange exchange = {0};
    for (uint32_t rank = 0; rank < link_ranks(communicator->link); rank++) {
        exchange.out[rank] = (Piece){from, count * size};
        exchange.in[rank] = (Piece){(char *)to + offsets[rank] * size, counts[rank] * size};
    }
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclAlltoAllV(const void *from, const uint64_t *out_counts,
    const uint64_t *out_offsets, HcclDataType out_type, void *to, const uint64_t *in_counts,
    const uint64_t *in_offsets, HcclDataType in_type, Communicator *communicator, Stream stream) {
    (void)stream;
    size_t out_size = type_bytes(out_type), in_size = type_bytes(in_type);
    if (out_size == 0) return refuse("HcclAlltoAllV", "data type", out_type);
    if (in_size == 0) return refuse("HcclAlltoAllV", "data type", in_type);
    Exchange exchange = {0};
    for (uint32_t rank = 0; rank < link_ranks(communicator->link); rank++) {
        exchange.out[rank] =
            (Piece){(char *)from + out_offsets[rank] * out_size, out_counts[rank] * out_size};
        exchange.in[rank] =
            (Piece){(char *)to + in_offsets[rank] * in_size, in_counts[rank] * in_size};
    }
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclAlltoAll(const void *from, uint64_t out_count, HcclDataType out_type,
    void *to, uint64_t in_count, HcclDataType in_type, Communicator *communicator,
    Stream stream) {
    uint64_t out_counts[MAX_RANKS], out_offsets[MAX_RANKS];
    uint64_t in_counts[MAX_RANKS], in_offsets[MAX_RANKS];
    for (uint32_t rank = 0; rank < MAX_RANKS; rank++) {
        out_counts[rank] = out_count;
        out_offsets[rank] = rank * out_count;
        in_counts[rank] = in_count;
        in_offsets[rank] = rank * in_count;
    }
    return HcclAlltoAllV(from, out_counts, out_offsets, out_type, to, in_counts, in_offsets,
        in_type, communicator, stream);
}

EXPORT HcclResult HcclBarrier(Communicator *communicator, Stream stream) {
    char here = 1, there[MAX_RANKS];
    return HcclAllGather(&here, there, 1, HCCL_DATA_TYPE_INT8, communicator, stream);
}

EXPORT HcclResult HcclSend(void *data, uint64_t count, HcclDataType type, uint32_t receiver,
    Communicator *communicator, Stream stream) {
    (void)stream;
    if (type_bytes(type) == 0) return refuse("HcclSend", "data type", type);
    Exchange exchange = {0};
    exchange.out[receiver] = (Piece){data, count * type_bytes(type)};
    return run(communicator, &exchange);
}

EXPORT HcclResult HcclRecv(void *data, uint64_t count, HcclDataType type, uint32_t sender,
    Communicator *communicator, Stream stream) {
    (void)stream;
    if (type_bytes(type) == 0) return refuse("HcclRecv", "data type", type);
    Exchange exchange = {0};
    exchange.in[sender] = (Piece){data, count * type_bytes(type)};
    return run(communicator, &exchange);
}

typedef struct {
    int is_receive;
    void *data;
    uint64_t count;
    HcclDataType type;
    uint32_t rank;
} SendOrReceive;

/* A rank that is named twice in one direction gets its second message in another exchange. */
EXPORT HcclResult HcclBatchSendRecv(
    SendOrReceive *items, uint32_t count, Communicator *communicator, Stream stream) {
    (void)stream;
    uint8_t done[count + 1];
    memset(done, 0, sizeof done);
    for (uint32_t left = count; left > 0;) {
        Exchange exchange = {0};
        for (uint32_t i = 0; i < count; i++) {
            Piece *slot = &(items[i].is_receive ? exchange.in : exchange.out)[items[i].rank];
            if (done[i] || slot->data) continue;
            *slot = (Piece){items[i].data, items[i].count * type_bytes(items[i].type)};
            done[i] = 1;
            left--;
        }
        HcclResult result = run(communicator, &exchange);
        if (result) return result;
    }
    return HCCL_SUCCESS;
}

static HcclResult refuse_reduction(const char *call, HcclDataType type, HcclReduceOp how) {
    if (can_reduce(type, how)) return HCCL_SUCCESS;
    if (can_reduce(type, HCCL_REDUCE_SUM)) return refuse(call, "for this type the operation", how);
    return refuse(call, "data type", type);
}

/* Gathers at most REDUCED_AT_ONCE elements of every rank at the ranks in `readers`, and reduces
 * them there in the order of the ranks, so that all readers get the same bits.
 *
 * out[r] is what this rank has for reader r. */
static HcclResult reduce_some(Communicator *communicator, const Piece out[MAX_RANKS], char *result,
    size_t count, HcclDataType type, HcclReduceOp how, uint32_t readers) {
    uint32_t ranks = link_ranks(communicator->link);
    int reads = readers >> link_rank(communicator->link) & 1;
    size_t bytes = count * type_bytes(type);
    char *all = reads ? malloc(ranks * bytes + 1) : NULL;
    Exchange exchange = {0};
    for (uint32_t rank = 0; rank < ranks; rank++) {
        if (readers >> rank & 1) exchange.out[rank] = (Piece){out[rank].data, bytes};
        if (reads) exchange.in[rank] = (Piece){all + rank * bytes, bytes};
    }
    HcclResult code = run(communicator, &exchange);
    if (code == HCCL_SUCCESS && reads) {
        for (uint32_t rank = 1; rank < ranks; rank++) {
            reduce_into(all, all + rank * bytes, count, type, how);
        }
        memcpy(result, all, bytes);
    }
    free(all);
    return code;
}

static HcclResult reduce(Communicator *communicator, const Piece from[MAX_RANKS], char *result,
    size_t count, HcclDataType type, HcclReduceOp how, uint32_t readers) {
    for (size_t done = 0; done < count;) {
        size_t some = count - done < REDUCED_AT_ONCE ? count - done : REDUCED_AT_ONCE;
        Piece out[MAX_RANKS];
        for (uint32_t rank = 0; rank < MAX_RANKS; rank++) {
            out[rank].data = from[rank].data + done * type_bytes(type);
        }
        HcclResult code = reduce_some(communicator, out, result + done * type_bytes(type), some,
            type, how, readers);
        if (code) return code;
        done += some;
    }
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclAllReduce(void *from, void *to, uint64_t count, HcclDataType type,
    HcclReduceOp how, Communicator *communicator, Stream stream) {
    (void)stream;
    HcclResult refused = refuse_reduction("HcclAllReduce", type, how);
    if (refused) return refused;
    Piece out[MAX_RANKS];
    for (uint32_t rank = 0; rank < MAX_RANKS; rank++) out[rank].data = from;
    return reduce(communicator, out, to, count, type, how, ~0u);
}

EXPORT HcclResult HcclReduce(void *from, void *to, uint64_t count, HcclDataType type,
    HcclReduceOp how, uint32_t root, Communicator *communicator, Stream stream) {
    (void)stream;
    HcclResult refused = refuse_reduction("HcclReduce", type, how);
    if (refused) return refused;
    Piece out[MAX_RANKS];
    for (uint32_t rank = 0; rank < MAX_RANKS; rank++) out[rank].data = from;
    return reduce(communicator, out, to, count, type, how, 1u << root);
}

EXPORT HcclResult HcclReduceScatter(void *from, void *to, uint64_t count, HcclDataType type,
    HcclReduceOp how, Communicator *communicator, Stream stream) {
    (void)stream;
    HcclResult refused = refuse_reduction("HcclReduceScatter", type, how);
    if (refused) return refused;
    Piece out[MAX_RANKS];
    for (uint32_t rank = 0; rank < MAX_RANKS; rank++) {
        out[rank].data = (char *)from + rank * count * type_bytes(type);
    }
    return reduce(communicator, out, to, count, type, how, ~0u);
}
