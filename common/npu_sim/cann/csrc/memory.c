/* Device memory is host memory that is counted against the size of its card. */
#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGNMENT 512

/* Stands before every block: aclrtFree is not told whose the memory was, nor how much. */
typedef struct {
    size_t bytes;
    int card;
} BlockHeader;

_Static_assert(sizeof(BlockHeader) <= ALIGNMENT, "the header must fit before the block");

static atomic_size_t used_bytes[MAX_CARDS];

size_t card_bytes(void) {
    const char *text = getenv("NPU_SIM_MEMORY");
    return text ? strtoull(text, NULL, 10) : (size_t)64 << 30;
}

static aclError take(int card, size_t bytes) {
    size_t used = atomic_fetch_add(&used_bytes[card], bytes);
    if (used + bytes <= card_bytes()) return ACL_SUCCESS;
    atomic_fetch_sub(&used_bytes[card], bytes);
    return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "device %d has no %zu bytes left", card, bytes);
}

static void give_back(int card, size_t bytes) { atomic_fetch_sub(&used_bytes[card], bytes); }

EXPORT aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *free_bytes, size_t *total) {
    (void)kind;
    *total = card_bytes();
    *free_bytes = *total - atomic_load(&used_bytes[current_card()]);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMalloc(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    (void)policy;
    int card = current_card();
    if (take(card, bytes)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    char *block;
    if (posix_memalign((void **)&block, ALIGNMENT, ALIGNMENT + bytes)) {
        give_back(card, bytes);
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes left", bytes);
    }
    *(BlockHeader *)block = (BlockHeader){bytes, card};
    *pointer = block + ALIGNMENT;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMallocAlign32(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, bytes, policy);
}

EXPORT aclError aclrtFree(void *pointer) {
    BlockHeader *block = (BlockHeader *)((char *)pointer - ALIGNMENT);
    give_back(block->card, block->bytes);
    free(block);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMallocHost(void **pointer, size_t bytes) {
    if (posix_memalign(pointer, ALIGNMENT, bytes ? bytes : 1)) {
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes left", bytes);
    }
    return ACL_SUCCESS;
}

EXPORT aclError aclrtFreeHost(void *pointer) {
    free(pointer);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMemcpy(
    void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind) {
    (void)kind;
    if (bytes > room) {
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes do not fit in %zu", bytes, room);
    }
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes,
    aclrtMemcpyKind kind, aclrtStream stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, bytes, kind);
}

EXPORT aclError aclrtMemset(void *pointer, size_t room, int32_t value, size_t bytes) {
    if (bytes > room) {
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes do not fit in %zu", bytes, room);
    }
    memset(pointer, value, bytes);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMemsetAsync(
    void *pointer, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
    (void)stream;
    return aclrtMemset(pointer, room, value, bytes);
}

/* Expandable segments (PYTORCH_NPU_ALLOC_CONF): addresses are reserved once, as many as the card
 * has bytes, and get memory piece by piece. A handle only counts: the reserved addresses
 * themselves become usable. */
#define MAX_RESERVED 64
static struct {
    void *start;
    size_t bytes;
} reserved[MAX_RESERVED];

EXPORT aclError aclrtReserveMemAddress(
    void **pointer, size_t bytes, size_t alignment, void *wanted, uint64_t flags) {
    (void)alignment, (void)wanted, (void)flags;
    int slot = 0;
    while (slot < MAX_RESERVED && reserved[slot].start) slot++;
    void *start = MAP_FAILED;
    if (slot < MAX_RESERVED) {
        int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        start = mmap(NULL, bytes, PROT_NONE, how, -1, 0);
    }
    if (start == MAP_FAILED) {
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "no room for %zu bytes of addresses", bytes);
    }
    reserved[slot].start = *pointer = start;
    reserved[slot].bytes = bytes;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtReleaseMemAddress(void *pointer) {
    for (int slot = 0; slot < MAX_RESERVED; slot++) {
        if (reserved[slot].start != pointer) continue;
        munmap(pointer, reserved[slot].bytes);
        reserved[slot].start = NULL;
        return ACL_SUCCESS;
    }
    return refuse(ACL_ERROR_RT_PARAM_INVALID, "these addresses were not reserved");
}

EXPORT aclError aclrtMallocPhysical(
    aclrtDrvMemHandle *handle, size_t bytes, const aclrtPhysicalMemProp *kind, uint64_t flags) {
    (void)flags;
    int card = (int)kind->location.id;
    if (take(card, bytes)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    BlockHeader *block = malloc(sizeof *block);
    *block = (BlockHeader){bytes, card};
    *handle = block;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    BlockHeader *block = handle;
    give_back(block->card, block->bytes);
    free(block);
    return ACL_SUCCESS;
}

/* aclrtUnmapMem is not told how many bytes were mapped, so each mapping is remembered. */
typedef struct Mapping {
    void *start;
    size_t bytes;
    struct Mapping *next;
} Mapping;

static Mapping *mappings;
static pthread_mutex_t mappings_lock = PTHREAD_MUTEX_INITIALIZER;

EXPORT aclError aclrtMapMem(
    void *pointer, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    (void)offset, (void)handle, (void)flags;
    if (mprotect(pointer, bytes, PROT_READ | PROT_WRITE)) {
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "these addresses were not reserved");
    }
    Mapping *mapping = malloc(sizeof *mapping);
    pthread_mutex_lock(&mappings_lock);
    *mapping = (Mapping){pointer, bytes, mappings};
    mappings = mapping;
    pthread_mutex_unlock(&mappings_lock);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtUnmapMem(void *pointer) {
    pthread_mutex_lock(&mappings_lock);
    Mapping **place = &mappings;
    while (*place && (*place)->start != pointer) place = &(*place)->next;
    Mapping *mapping = *place;
    if (mapping) *place = mapping->next;
    pthread_mutex_unlock(&mappings_lock);
    if (mapping == NULL) return refuse(ACL_ERROR_RT_PARAM_INVALID, "nothing was mapped there");
    /* Fresh pages without access: the memory goes back, and who still uses it is caught. */
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    mmap(pointer, mapping->bytes, PROT_NONE, how, -1, 0);
    free(mapping);
    return ACL_SUCCESS;
}

/* Sharing memory between processes is what HCCL does here by its own means. */
EXPORT aclError aclrtMemExportToShareableHandle(
    aclrtDrvMemHandle handle, aclrtMemHandleType type, uint64_t flags, uint64_t *shareable) {
    (void)handle, (void)type, (void)flags, (void)shareable;
    return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "the stand-in shares no device memory");
}

EXPORT aclError aclrtMemImportFromShareableHandle(
    uint64_t shareable, int32_t card, aclrtDrvMemHandle *handle) {
    (void)shareable, (void)card, (void)handle;
    return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "the stand-in shares no device memory");
}

EXPORT aclError aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t count) {
    (void)shareable, (void)pids, (void)count;
    return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "the stand-in shares no device memory");
}
