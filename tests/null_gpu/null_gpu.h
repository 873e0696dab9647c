// What the parts of the null GPU know of each other.
//
// The null GPU stands in for CUDA's runtime, its driver and cuBLAS, in front of the real libraries
// (LD_PRELOAD). Torch sees one H200. Its memory is address space without pages, kernels are counted
// and not run, whatever is read back is zero. The rules of stream capture are kept.
//
//   memory.c    allocations and copies
//   streams.c   streams, events, captures, graphs, and what waits for the device
//   device.c    what the device says of itself
//   launches.c  kernels and their modules; counts, violations
//   cublas.c    matrix products and their workspaces
//
// All other symbols that torch and Triton ask for succeed and do nothing (build.py writes them).

#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

// In this order in `null_gpu_counts`, under the names of `null_gpu_count_name`.
enum count {
    LAUNCHES,        // kernels, and matrix products of cuBLAS
    MEMSETS,         // convolutions and BatchNorms of cuDNN among them: see device.py
    COPIES_TO_DEVICE,
    COPIES_TO_HOST,
    COPIES_ON_DEVICE,
    GRAPH_LAUNCHES,
    GRAPH_NODES,     // replayed by these launches
    SYNCS,           // calls in which the host waits for the device
    PAGEABLE,        // copies between the device and pageable memory: they wait, too
    STRAYS,          // work on another stream while a capture is under way: it is not captured
    VIOLATIONS,      // of the rules of capture
    NUM_COUNTS
};

void count(enum count which, long by);

// Reports a call that a capture forbids; see `null_gpu_violation`.
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Sets what cudaGetLastError returns, and returns it.
cudaError_t failed(cudaError_t error);

// Something that runs on a stream, of the kind `which`: counted, or a node of the stream's capture.
// Returns whether it was captured.
int enqueue(cudaStream_t stream, enum count which);

// A call that is forbidden while a capture is under way, unless this thread relaxed the rules.
cudaError_t check_no_capture(const char *call);

// Notes that work on a stream that is being captured uses a workspace.
void note_workspace(cudaStream_t stream, void *workspace);

// What an address belongs to: cudaMemoryTypeDevice, ...Host (page-locked) or ...Unregistered.
enum cudaMemoryType memory_type(const void *address);
size_t device_bytes(void);

// For symbols without an implementation: notes the call if NULL_GPU_TRACE is set.
int succeed(const char *symbol);

#endif
