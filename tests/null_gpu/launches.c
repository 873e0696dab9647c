// Kernels, the modules they come from, and what is counted.

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

#define MAX_THREADS_PER_BLOCK 1024
#define MAX_GRID_X 2147483647u
#define MAX_GRID_YZ 65535u
#define MAX_SHARED_MEMORY 232448
#define MAX_REMEMBERED 64

static long counts[NUM_COUNTS];
static char messages[MAX_REMEMBERED][160];
static __thread cudaError_t last_error;

void count(enum count which, long by) { __atomic_fetch_add(&counts[which], by, __ATOMIC_RELAXED); }

void violation(const char *format, ...) {
    long index = __atomic_fetch_add(&counts[VIOLATIONS], 1, __ATOMIC_RELAXED);
    if (index >= MAX_REMEMBERED) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(messages[index], sizeof messages[index], format, arguments);
    va_end(arguments);
    fprintf(stderr, "[null GPU] %s\n", messages[index]);
}

int succeed(const char *symbol) {
    if (getenv("NULL_GPU_TRACE")) fprintf(stderr, "[null GPU] %s\n", symbol);
    return 0;
}

EXPORT void null_gpu_counts(long *values) { memcpy(values, counts, sizeof counts); }

EXPORT const char *null_gpu_count_name(int which) {
    static const char *const names[NUM_COUNTS + 1] = {
        "launches",  "memsets", "to_device", "to_host", "on_device",  "graph_launches",
        "graph_nodes", "syncs", "pageable",  "strays",  "violations", NULL,
    };
    return names[which];
}

// The text of a violation; NULL beyond the last, or beyond the first 64.
EXPORT const char *null_gpu_violation(long index) {
    return index < counts[VIOLATIONS] && index < MAX_REMEMBERED ? messages[index] : NULL;
}

// Errors ----------------------------------------------------------------------------------------

cudaError_t failed(cudaError_t error) {
    if (error) last_error = error;
    return error;
}

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }

EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated:
            return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureUnjoined:
            return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation:
            return "dependency created on uncaptured work in another stream";
        default: return "an error of the null GPU";
    }
}

EXPORT const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}

// Launches --------------------------------------------------------------------------------------

static cudaError_t launch(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
    unsigned long threads = (unsigned long)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > MAX_GRID_X || grid.y > MAX_GRID_YZ ||
        grid.z > MAX_GRID_YZ || !threads || threads > MAX_THREADS_PER_BLOCK ||
        shared_memory > MAX_SHARED_MEMORY)
        return failed(cudaErrorInvalidConfiguration);
    enqueue(stream, LAUNCHES);
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                    size_t shared_memory, cudaStream_t stream) {
    (void)function, (void)arguments;
    return launch(grid, block, shared_memory, stream);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block,
                                               void **arguments, size_t shared_memory,
                                               cudaStream_t stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared_memory, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                       void **arguments) {
    (void)function, (void)arguments;
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    if (!enqueue(stream, LAUNCHES)) function(argument);
    return cudaSuccess;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                               unsigned grid_z, unsigned block_x, unsigned block_y,
                               unsigned block_z, unsigned shared_memory, CUstream stream,
                               void **arguments, void **extra) {
    (void)function, (void)arguments, (void)extra;
    dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    return (CUresult)launch(grid, block, shared_memory, stream);
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                          unsigned grid_z, unsigned block_x, unsigned block_y,
                                          unsigned block_z, unsigned shared_memory, CUstream stream,
                                          void **arguments) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z,
                          shared_memory, stream, arguments, NULL);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                                 void **arguments, void **extra) {
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                          config->blockDimX, config->blockDimY, config->blockDimZ,
                          config->sharedMemBytes, config->hStream, arguments, extra);
}

// What nvcc makes of kernel<<<grid, block, shared_memory, stream>>>(...) in torch's own files.

struct call {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
};
static __thread struct call pending;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory,
                                            cudaStream_t stream) {
    pending = (struct call){grid, block, shared_memory, stream};
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_memory,
                                              void *stream) {
    *grid = pending.grid;
    *block = pending.block;
    *shared_memory = pending.shared_memory;
    *(cudaStream_t *)stream = pending.stream;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                                      size_t shared_memory, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_memory, stream);
}

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    (void)binary;
    return &handle;
}

// Modules: Triton's and Inductor's kernels ------------------------------------------------------

struct CUmod_st {
    int unused;
};

struct CUfunc_st {
    int unused;
};

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    (void)image;
    *module = calloc(1, sizeof **module);
    return *module ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned number,
                                   CUjit_option *options, void **values) {
    (void)number, (void)options, (void)values;
    return cuModuleLoadData(module, image);
}

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *file) {
    return cuModuleLoadData(module, file);
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    free(module);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    static struct CUfunc_st any;
    (void)module, (void)name;
    *function = &any;
    return CUDA_SUCCESS;
}
