/* The wire between the ranks: a mailbox for each ordered pair of them, in shared memory.
 *
 * The sender of a mailbox fills it when it is empty, the receiver empties it when it is full, so
 * nothing else has to be agreed upon, and memory is bounded whatever the size of a message. */
#define _GNU_SOURCE
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAIL_BYTES ((size_t)256 << 10)
#define SPINS_BEFORE_SLEEP 200
#define SLEEP_NS 50000

typedef struct {
    atomic_uint filled; /* bytes that wait for the receiver; 0 is empty */
    char data[MAIL_BYTES];
} Mailbox;

typedef struct {
    atomic_uint arrived;
    atomic_int process[MAX_RANKS]; /* 0 before a rank has arrived */
    Mailbox mail[];                /* ranks x ranks: sender first */
} Shared;

struct Link {
    Shared *shared;
    size_t shared_bytes;
    uint32_t ranks;
    uint32_t rank;
};

uint32_t link_ranks(const Link *link) { return link->ranks; }

uint32_t link_rank(const Link *link) { return link->rank; }

/* A wait that sleeps after a while and fails, rather than hang, when a rank has died or nothing
 * has moved for the time that HCCL's own variables give. */
typedef struct {
    time_t since;
    time_t seconds;
    unsigned turns;
} Wait;

static time_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
}

static Wait wait_begin(const char *variable, time_t seconds) {
    const char *text = getenv(variable);
    if (text && atol(text) > 0) seconds = atol(text);
    return (Wait){now(), seconds, 0};
}

static int has_died(const Shared *shared, uint32_t rank) {
    int process = atomic_load(&shared->process[rank]);
    return process != 0 && kill(process, 0) != 0 && errno == ESRCH;
}

/* Only the ranks in `needed` matter: another may well have done its part and ended. */
static HcclResult wait_turn(Wait *wait, const Link *link, unsigned needed) {
    if (++wait->turns < SPINS_BEFORE_SLEEP) return HCCL_SUCCESS;
    nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    if (wait->turns % SPINS_BEFORE_SLEEP) return HCCL_SUCCESS;
    for (uint32_t rank = 0; rank < link->ranks; rank++) {
        if (needed >> rank & 1 && has_died(link->shared, rank)) return HCCL_E_REMOTE;
    }
    return now() - wait->since > wait->seconds ? HCCL_E_TIMEOUT : HCCL_SUCCESS;
}

static void wait_moved(Wait *wait) {
    wait->since = now();
    wait->turns = 0;
}

static HcclResult map_shared(const char *name, Link *link) {
    size_t mailboxes = (size_t)link->ranks * link->ranks;
    link->shared_bytes = sizeof(Shared) + mailboxes * sizeof(Mailbox);
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0) return HCCL_E_SYSCALL;
    void *memory = MAP_FAILED;
    if (ftruncate(file, (off_t)link->shared_bytes) == 0) {
        memory = mmap(NULL, link->shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    close(file);
    if (memory == MAP_FAILED) return HCCL_E_SYSCALL;
    link->shared = memory;
    return HCCL_SUCCESS;
}

HcclResult link_open(const char *name, uint32_t ranks, uint32_t rank, Link **made) {
    if (ranks > MAX_RANKS || rank >= ranks) return HCCL_E_PARA;
    Link *link = calloc(1, sizeof *link);
    link->ranks = ranks;
    link->rank = rank;
    HcclResult result = map_shared(name, link);
    if (result == HCCL_SUCCESS) {
        atomic_store(&link->shared->process[rank], getpid());
        atomic_fetch_add(&link->shared->arrived, 1);
        Wait wait = wait_begin("HCCL_CONNECT_TIMEOUT", 120);
        while (!result && atomic_load(&link->shared->arrived) < ranks) {
            result = wait_turn(&wait, link, ~0u);
        }
        /* All have it mapped, or never will: it goes when the last of them ends. */
        shm_unlink(name);
    }
    if (result) {
        link_close(link);
        return result;
    }
    *made = link;
    return HCCL_SUCCESS;
}

void link_close(Link *link) {
    if (link->shared) munmap(link->shared, link->shared_bytes);
    free(link);
}

static Mailbox *mailbox(Link *link, uint32_t sender, uint32_t receiver) {
    return &link->shared->mail[sender * link->ranks + receiver];
}

static size_t push(Mailbox *box, const char *data, size_t bytes) {
    if (bytes == 0 || atomic_load_explicit(&box->filled, memory_order_acquire)) return 0;
    size_t now_bytes = bytes < MAIL_BYTES ? bytes : MAIL_BYTES;
    memcpy(box->data, data, now_bytes);
    atomic_store_explicit(&box->filled, (unsigned)now_bytes, memory_order_release);
    return now_bytes;
}

static HcclResult pull(Mailbox *box, char *data, size_t bytes, size_t *moved) {
    size_t filled = bytes ? atomic_load_explicit(&box->filled, memory_order_acquire) : 0;
    *moved = filled;
    if (filled == 0) return HCCL_SUCCESS;
    if (filled > bytes) return HCCL_E_PARA; /* the ranks do not agree on the size */
    memcpy(data, box->data, filled);
    atomic_store_explicit(&box->filled, 0, memory_order_release);
    return HCCL_SUCCESS;
}

/* Moves what can be moved between this rank and another; counts it in `moved`. */
static HcclResult move(Link *link, uint32_t rank, Piece *to, Piece *from, size_t *moved) {
    size_t sent = push(mailbox(link, link->rank, rank), to->data, to->bytes);
    *to = (Piece){to->data + sent, to->bytes - sent};
    size_t got = 0;
    HcclResult result = pull(mailbox(link, rank, link->rank), from->data, from->bytes, &got);
    if (result) return result;
    *from = (Piece){from->data + got, from->bytes - got};
    *moved += sent + got;
    return HCCL_SUCCESS;
}

HcclResult link_exchange(Link *link, const Piece out[MAX_RANKS], const Piece in[MAX_RANKS]) {
    Piece to[MAX_RANKS], from[MAX_RANKS];
    memcpy(to, out, sizeof to);
    memcpy(from, in, sizeof from);
    Wait wait = wait_begin("HCCL_EXEC_TIMEOUT", 300);
    for (;;) {
        unsigned needed = 0;
        size_t moved = 0;
        for (uint32_t rank = 0; rank < link->ranks; rank++) {
            HcclResult result = move(link, rank, &to[rank], &from[rank], &moved);
            if (result) return result;
            if (to[rank].bytes || from[rank].bytes) needed |= 1u << rank;
        }
        if (needed == 0) return HCCL_SUCCESS;
        if (moved) {
            wait_moved(&wait);
            continue;
        }
        HcclResult result = wait_turn(&wait, link, needed);
        if (result) return result;
    }
}
