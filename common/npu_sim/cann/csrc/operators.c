/* Operators by name (aclop): the older of the two ways in which torch_npu starts one.
 *
 * kernels.cpp puts CPU kernels in the place of those that torch dispatches, so only what
 * torch_npu's own code starts directly arrives here. What is not in the table is refused by name,
 * so that a gap cannot pass for a result. */
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    aclDataType type;
    aclFormat format;
    int dimensions;
    int64_t sizes[];
} TensorDescription;

EXPORT aclTensorDesc *aclCreateTensorDesc(
    aclDataType type, int dimensions, const int64_t *sizes, aclFormat format) {
    size_t bytes = sizeof(int64_t) * (size_t)dimensions;
    TensorDescription *made = malloc(sizeof *made + bytes);
    *made = (TensorDescription){.type = type, .format = format, .dimensions = dimensions};
    if (bytes) memcpy(made->sizes, sizes, bytes);
    return (aclTensorDesc *)made;
}

EXPORT void aclDestroyTensorDesc(const aclTensorDesc *tensor) { free((void *)tensor); }

EXPORT aclDataType aclGetTensorDescType(const aclTensorDesc *tensor) {
    return ((const TensorDescription *)tensor)->type;
}

EXPORT aclFormat aclGetTensorDescFormat(const aclTensorDesc *tensor) {
    return ((const TensorDescription *)tensor)->format;
}

EXPORT size_t aclGetTensorDescNumDims(const aclTensorDesc *tensor) {
    return (size_t)((const TensorDescription *)tensor)->dimensions;
}

EXPORT aclError aclGetTensorDescDimV2(const aclTensorDesc *tensor, size_t index, int64_t *size) {
    const TensorDescription *described = (const TensorDescription *)tensor;
    if (index >= (size_t)described->dimensions) {
        return refuse(ACL_ERROR_INVALID_PARAM, "the tensor has no dimension %zu", index);
    }
    *size = described->sizes[index];
    return ACL_SUCCESS;
}

typedef struct {
    void *data;
    size_t bytes;
} DataBuffer;

EXPORT aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
    DataBuffer *made = malloc(sizeof *made);
    *made = (DataBuffer){data, bytes};
    return (aclDataBuffer *)made;
}

EXPORT aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    free((void *)buffer);
    return ACL_SUCCESS;
}

EXPORT aclopAttr *aclopCreateAttr(void) { return malloc(1); }

EXPORT void aclopDestroyAttr(const aclopAttr *attributes) { free((void *)attributes); }

/* An operand: what it is, and where. */
typedef struct {
    const TensorDescription *tensor;
    const DataBuffer *buffer;
} Operand;

static size_t element_bytes(aclDataType type) {
    switch (type) {
        case ACL_BOOL:
        case ACL_INT8:
        case ACL_UINT8: return 1;
        case ACL_BF16:
        case ACL_FLOAT16:
        case ACL_INT16:
        case ACL_UINT16: return 2;
        case ACL_FLOAT:
        case ACL_INT32:
        case ACL_UINT32: return 4;
        default: return 8;
    }
}

static size_t operand_bytes(Operand operand) {
    size_t bytes = element_bytes(operand.tensor->type);
    for (int i = 0; i < operand.tensor->dimensions; i++) bytes *= (size_t)operand.tensor->sizes[i];
    return bytes;
}

/* Fill(shape, value) */
static aclError fill(const Operand *inputs, Operand output) {
    size_t element = element_bytes(output.tensor->type);
    for (size_t done = 0; done < operand_bytes(output); done += element) {
        memcpy((char *)output.buffer->data + done, inputs[1].buffer->data, element);
    }
    return ACL_SUCCESS;
}

/* PadV3(x, paddings, value) of one row with zeros at its end, the only padding that comes. */
static aclError pad(const Operand *inputs, Operand output) {
    const TensorDescription *x = inputs[0].tensor;
    size_t given = operand_bytes(inputs[0]), wanted = operand_bytes(output);
    if (x->dimensions != 2 || x->sizes[0] != 1 || wanted < given) {
        return refuse(ACL_ERROR_INVALID_PARAM, "the stand-in CANN pads a single row only");
    }
    memcpy(output.buffer->data, inputs[0].buffer->data, given);
    memset((char *)output.buffer->data + given, 0, wanted - given);
    return ACL_SUCCESS;
}

#define MAX_INPUTS 3

/* ProcessGroupHCCL pads what it sends to 512 bytes with these two. */
static const struct {
    const char *name;
    int inputs;
    aclError (*compute)(const Operand *inputs, Operand output);
} operators[] = {{"Fill", 2, fill}, {"PadV3", 3, pad}};

static aclError execute(const char *name, int count, const aclTensorDesc *const in_tensors[],
    const aclDataBuffer *const in_data[], const aclTensorDesc *const out_tensors[],
    const aclDataBuffer *const out_data[]) {
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (strcmp(operators[i].name, name) != 0 || operators[i].inputs != count) continue;
        Operand inputs[MAX_INPUTS];
        for (int n = 0; n < count; n++) {
            inputs[n] = (Operand){(const void *)in_tensors[n], (const void *)in_data[n]};
        }
        Operand output = {(const void *)out_tensors[0], (const void *)out_data[0]};
        return operators[i].compute(inputs, output);
    }
    return refuse(ACL_ERROR_OP_NOT_FOUND, "the stand-in CANN has no operator %s", name);
}

EXPORT aclError aclopCompileAndExecute(const char *operator, int inputs,
    const aclTensorDesc *const in_tensors[], const aclDataBuffer *const in_data[], int outputs,
    const aclTensorDesc *const out_tensors[], aclDataBuffer *const out_data[],
    const aclopAttr *attributes, aclopEngineType engine, aclopCompileType compile,
    const char *path, aclrtStream stream) {
    (void)outputs, (void)attributes, (void)engine, (void)compile, (void)path, (void)stream;
    return execute(operator, inputs, in_tensors, in_data, out_tensors, (const void *)out_data);
}

EXPORT aclError aclopCompileAndExecuteV2(const char *operator, int inputs,
    aclTensorDesc *in_tensors[], aclDataBuffer *in_data[], int outputs,
    aclTensorDesc *out_tensors[], aclDataBuffer *out_data[], aclopAttr *attributes,
    aclopEngineType engine, aclopCompileType compile, const char *path, aclrtStream stream) {
    (void)outputs, (void)attributes, (void)engine, (void)compile, (void)path, (void)stream;
    return execute(operator, inputs, (const void *)in_tensors, (const void *)in_data,
        (const void *)out_tensors, (const void *)out_data);
}

/* Options of the operator compiler are kept by nobody, but torch_npu reads one back. */
EXPORT size_t aclGetCompileoptSize(aclCompileOpt option) {
    (void)option;
    return 8;
}

EXPORT aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t bytes) {
    (void)option;
    memset(value, 0, bytes);
    return ACL_SUCCESS;
}
