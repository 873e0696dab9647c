// What the device says of itself: an H200, compute capability 9.0.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

#define CUDA_VERSION_MADE_UP 13000
#define MULTIPROCESSORS 132
#define REGISTERS_PER_THREAD 32

// CUdevice_attribute has the same numbers.
static int attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxBlockDimX: return 1024;
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: return 65535;
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrMaxRegistersPerBlock: return 65536;
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMultiProcessorCount: return MULTIPROCESSORS;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 2619000;
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        case cudaDevAttrL2CacheSize: return 60 << 20;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        default: return 1;  // "is ... supported?"
    }
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    (void)device;
    *value = attribute(which);
    return cudaSuccess;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    (void)device;
    *value = attribute((int)which);
    return CUDA_SUCCESS;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    (void)device;
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "NVIDIA H200 (null)");
    properties->totalGlobalMem = (size_t)141 << 30;
    properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
    properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX);
    properties->maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY);
    properties->maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
    properties->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    properties->maxGridSize[1] = attribute(cudaDevAttrMaxGridDimY);
    properties->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimZ);
    properties->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    properties->reservedSharedMemPerBlock = 1024;
    properties->totalConstMem = 65536;
    properties->textureAlignment = 512;
    properties->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    properties->concurrentKernels = 1;
    properties->asyncEngineCount = 3;
    properties->unifiedAddressing = 1;
    properties->managedMemory = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceCount(int *number) {
    *number = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    (void)device;
    strncpy(text, "0000:00:00.0", length);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    (void)device, (void)peer;
    *can = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_MADE_UP;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

EXPORT CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }

EXPORT CUresult cuDeviceGetCount(int *number) { return (CUresult)cudaGetDeviceCount(number); }

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

// Contexts: there is one ------------------------------------------------------------------------

struct CUctx_st {
    int unused;
};
static struct CUctx_st context;

EXPORT CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = &context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    (void)device;
    return cuCtxGetCurrent(retained);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    (void)device;
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

// Kernels as the device sees them ---------------------------------------------------------------

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes,
                                         const void *function) {
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = REGISTERS_PER_THREAD;
    return cudaSuccess;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    (void)function;
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? REGISTERS_PER_THREAD
                                                              : 0;
    return CUDA_SUCCESS;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                                 int threads, size_t memory) {
    (void)function, (void)threads, (void)memory;
    *blocks = 4;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks,
                                                                          const void *function,
                                                                          int threads,
                                                                          size_t memory,
                                                                          unsigned flags) {
    (void)flags;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, memory);
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                            int threads, size_t memory) {
    (void)function, (void)threads, (void)memory;
    *blocks = 4;
    return CUDA_SUCCESS;
}

// Functions asked for by name -------------------------------------------------------------------

static int nameless(void) { return succeed("a function that was asked for by name"); }

static void *by_name(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    return found ? found : (void *)nameless;
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                    unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    (void)version, (void)flags;
    *function = by_name(name);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

#undef cuGetProcAddress
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version,
                                 cuuint64_t flags) {
    (void)version, (void)flags;
    *function = by_name(name);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version,
                                    cuuint64_t flags, CUdriverProcAddressQueryResult *result) {
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return cuGetProcAddress(name, function, version, flags);
}

// Objects that nobody looks into.
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer,
                                        cudaHostFn_t destroy, unsigned references,
                                        unsigned flags) {
    (void)pointer, (void)destroy, (void)references, (void)flags;
    *object = malloc(1);
    return cudaSuccess;
}
