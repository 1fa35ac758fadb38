/* Shared by the sources of the stand-in libascendcl.so.
 *
 * The prototypes come from the CANN headers that torch_npu's wheel brings, so the compiler refuses
 * a function whose arguments are not those that torch_npu was built against. */
#pragma once

#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <acl/acl_prof.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_CARDS 16

/* Everything that torch_npu may look up; all else stays inside the library. */
#define EXPORT __attribute__((visibility("default")))

/* The card that this thread uses, as the driver numbers it; card 0 before aclrtSetDevice. */
int current_card(void);

/* The size of each card's memory: NPU_SIM_MEMORY, 64 GiB by default. */
size_t card_bytes(void);

/* Records what aclGetRecentErrMsg tells of a failure and returns its code. */
aclError refuse(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));
