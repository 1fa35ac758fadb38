/* Functions that accept everything and do nothing: each answers 0, which means success.
 *
 * They take no arguments here, which is as good as ignoring those that arrive: the C calling
 * conventions of x86-64 and aarch64 leave arguments to the caller. */
#define EXPORT __attribute__((visibility("default")))
#define ACCEPT(name) \
    EXPORT int name(void) { return 0; }

/* Waiting: everything is done when its call returns. */
ACCEPT(aclrtStreamWaitEvent)
ACCEPT(aclrtSynchronizeDevice)
ACCEPT(aclrtSynchronizeDeviceWithTimeout)
ACCEPT(aclrtSynchronizeEvent)
ACCEPT(aclrtSynchronizeStream)
ACCEPT(aclrtSynchronizeStreamWithTimeout)
ACCEPT(aclrtResetEvent)

/* A thread that serves callbacks of streams: they run at once, see aclrtLaunchCallback. */
ACCEPT(aclrtProcessReport)
ACCEPT(aclrtSubscribeReport)
ACCEPT(aclrtUnSubscribeReport)

/* Settings of what is not here: time limits, overflow modes, numbers of cores. */
ACCEPT(aclrtSetDeviceSatMode)
ACCEPT(aclrtSetExceptionInfoCallback)
ACCEPT(aclrtSetOpExecuteTimeOut)
ACCEPT(aclrtSetOpWaitTimeout)
ACCEPT(aclrtSetStreamAttribute)
ACCEPT(aclrtSetStreamFailureMode)
ACCEPT(aclrtSetStreamOverflowSwitch)
ACCEPT(aclrtUseStreamResInCurrentThread)
ACCEPT(aclrtUnuseStreamResInCurrentThread)

/* The last error of another thread: failures are reported where they happen. */
ACCEPT(aclrtGetLastError)
ACCEPT(aclrtPeekAtLastError)

/* The log. */
ACCEPT(aclAppLog)

/* Dumps of tensors. */
ACCEPT(aclmdlInitDump)
ACCEPT(aclmdlSetDump)
ACCEPT(aclmdlFinalizeDump)

/* Attributes of operators by name, which are refused when they are started, and the compiler. */
ACCEPT(aclopSetAttrBool)
ACCEPT(aclopSetAttrDataType)
ACCEPT(aclopSetAttrFloat)
ACCEPT(aclopSetAttrInt)
ACCEPT(aclopSetAttrListBool)
ACCEPT(aclopSetAttrListFloat)
ACCEPT(aclopSetAttrListInt)
ACCEPT(aclopSetAttrListListInt)
ACCEPT(aclopSetAttrString)
ACCEPT(aclopSetCompileFlag)
ACCEPT(aclSetCompileopt)
ACCEPT(aclSetTensorDescName)
ACCEPT(aclSetTensorFormat)
ACCEPT(aclSetTensorPlaceMent)
ACCEPT(aclSetTensorShape)

/* Kernels in binary form, of torch_npu's own and of triton: loaded, never run. */
ACCEPT(aclrtBinaryGetFunction)
ACCEPT(aclrtBinaryLoadFromData)
ACCEPT(aclrtGetFunctionAddr)
ACCEPT(rtDevBinaryRegister)
ACCEPT(rtFunctionRegister)
ACCEPT(rtGetC2cCtrlAddr)
ACCEPT(rtKernelLaunch)

/* Reports to the profiler of the device, which measures nothing. */
ACCEPT(MsprofRegisterCallback)
ACCEPT(MsprofReportAdditionalInfo)
ACCEPT(MsprofReportApi)
ACCEPT(MsprofReportCompactInfo)
ACCEPT(aclprofRegisterDeviceCallback)
