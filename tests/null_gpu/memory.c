// Allocations and copies. Device memory is address space without pages: a host that touches it
// crashes, as it would with a real GPU, and a large network costs no memory.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "null_gpu.h"

#define PAGE 4096
#define DEVICE_MEMORY ((size_t)141 << 30)

struct allocation {
    char *address;
    size_t size;
    enum cudaMemoryType type;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct allocation *allocations;
static size_t num_allocations, capacity, bytes_in_use;

static void remember(void *address, size_t size, enum cudaMemoryType type) {
    pthread_mutex_lock(&mutex);
    if (num_allocations == capacity) {
        capacity = capacity ? 2 * capacity : 256;
        allocations = realloc(allocations, capacity * sizeof *allocations);
        if (!allocations) abort();
    }
    allocations[num_allocations++] = (struct allocation){address, size, type};
    if (type == cudaMemoryTypeDevice) bytes_in_use += size;
    pthread_mutex_unlock(&mutex);
}

// Takes an allocation off the list; its size is 0 where there is none of that address.
static struct allocation forget(void *address) {
    struct allocation found = {0};
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < num_allocations; i++) {
        if (allocations[i].address != address) continue;
        found = allocations[i];
        allocations[i] = allocations[--num_allocations];
        if (found.type == cudaMemoryTypeDevice) bytes_in_use -= found.size;
        break;
    }
    pthread_mutex_unlock(&mutex);
    return found;
}

enum cudaMemoryType memory_type(const void *address) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < num_allocations; i++) {
        const struct allocation *a = &allocations[i];
        if ((const char *)address < a->address || (const char *)address >= a->address + a->size)
            continue;
        type = a->type;
        break;
    }
    pthread_mutex_unlock(&mutex);
    return type;
}

size_t device_bytes(void) { return bytes_in_use; }

EXPORT cudaError_t cudaMalloc(void **address, size_t size) {
    cudaError_t error = check_no_capture("cudaMalloc");
    if (error) return failed(error);
    size = (size + PAGE - 1) / PAGE * PAGE;
    if (bytes_in_use + size > DEVICE_MEMORY) return failed(cudaErrorMemoryAllocation);
    *address = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    remember(*address, size, cudaMemoryTypeDevice);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void *address) {
    if (!address) return cudaSuccess;  // torch's way of making a context
    cudaError_t error = check_no_capture("cudaFree");
    if (error) return failed(error);
    struct allocation found = forget(address);
    if (!found.size) return failed(cudaErrorInvalidValue);
    munmap(address, found.size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    cudaError_t error = check_no_capture("cudaHostAlloc");
    if (error) return failed(error);
    if (posix_memalign(address, PAGE, size ? size : PAGE)) return failed(cudaErrorMemoryAllocation);
    remember(*address, size, cudaMemoryTypeHost);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void *address) {
    if (!address) return cudaSuccess;
    forget(address);
    free(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
    (void)flags;
    remember(address, size, cudaMemoryTypeHost);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *address) {
    forget(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = DEVICE_MEMORY;
    *available = DEVICE_MEMORY - bytes_in_use;
    return cudaSuccess;
}

EXPORT CUresult cuMemGetInfo(size_t *available, size_t *total) {
    return (CUresult)cudaMemGetInfo(available, total);
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                            const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = memory_type(address);
    if (attributes->type == cudaMemoryTypeUnregistered) return cudaSuccess;
    attributes->devicePointer = (void *)address;
    if (attributes->type == cudaMemoryTypeHost) attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                      CUdeviceptr address) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

// The direction of a copy, from the addresses where the caller leaves it to them.
static enum cudaMemcpyKind direction(void *to, const void *from, enum cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDefault) return kind;
    int to_device = memory_type(to) == cudaMemoryTypeDevice;
    int from_device = memory_type(from) == cudaMemoryTypeDevice;
    if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
    return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

static enum count counted_as(enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyHostToDevice) return COPIES_TO_DEVICE;
    return kind == cudaMemcpyDeviceToHost ? COPIES_TO_HOST : COPIES_ON_DEVICE;
}

// What the host sees of a copy: nothing was ever computed, and so zeros come back.
static void host_side(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) memset(to, 0, size);
    if (kind == cudaMemcpyHostToHost) memcpy(to, from, size);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
    kind = direction(to, from, kind);
    const void *host = kind == cudaMemcpyHostToDevice ? from
                       : kind == cudaMemcpyDeviceToHost ? to : NULL;
    int pageable = host && memory_type(host) == cudaMemoryTypeUnregistered;
    if (enqueue(stream, counted_as(kind))) {
        if (pageable) violation("a copy of %zu bytes with pageable memory is captured", size);
        return cudaSuccess;
    }
    if (pageable) count(PAGEABLE, 1);
    host_side(to, from, size, kind);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    count(SYNCS, 1);
    cudaError_t error = check_no_capture("cudaMemcpy");
    if (error) return failed(error);
    host_side(to, from, size, direction(to, from, kind));
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    (void)to, (void)value, (void)size;
    enqueue(stream, MEMSETS);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size, NULL);
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char constants[1 << 16];  // a kernel's own variables: written by cudaMemcpyToSymbol
    (void)symbol;
    *address = constants;
    return cudaSuccess;
}
