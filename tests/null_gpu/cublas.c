// cuBLAS: one launch a matrix product, and which workspace it computes in. Two products that may
// run at the same time must not share one. Handles are pointers to their stream and workspace.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

#define SUCCESS 0
#define HEURISTIC_RESULT_BYTES 96  // sizeof(cublasLtMatmulHeuristicResult_t)

struct handle {
    cudaStream_t stream;
    void *workspace;
};

EXPORT int cublasCreate_v2(struct handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return SUCCESS;
}

EXPORT int cublasSetStream_v2(struct handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return SUCCESS;
}

EXPORT int cublasSetWorkspace_v2(struct handle *handle, void *workspace, size_t size) {
    (void)size;
    handle->workspace = workspace;
    return SUCCESS;
}

EXPORT int cublasGetMathMode(struct handle *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return SUCCESS;
}

EXPORT int cublasGetPointerMode_v2(struct handle *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return SUCCESS;
}

// Everything that computes (build.py): all of these functions take the handle first.
int blas_launch(struct handle *handle) {
    note_workspace(handle->stream, handle->workspace);
    enqueue(handle->stream, LAUNCHES);
    return SUCCESS;
}

// cublasLt: descriptions that nobody reads ------------------------------------------------------

EXPORT int cublasLtCreate(void **handle) {
    *handle = malloc(1);
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescCreate(void **description, int compute_type, int scale_type) {
    (void)compute_type, (void)scale_type;
    return cublasLtCreate(description);
}

EXPORT int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns,
                                      int64_t leading) {
    (void)type, (void)rows, (void)columns, (void)leading;
    return cublasLtCreate(layout);
}

EXPORT int cublasLtMatmulPreferenceCreate(void **preference) { return cublasLtCreate(preference); }

EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b,
                                          void *c, void *d, void *preference, int asked,
                                          void *results, int *found) {
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference;
    memset(results, 0, (size_t)asked * HEURISTIC_RESULT_BYTES);
    *found = 1;
    return SUCCESS;
}

EXPORT int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a,
                          void *a_layout, const void *b, void *b_layout, const void *beta,
                          const void *c, void *c_layout, void *d, void *d_layout,
                          const void *algorithm, void *workspace, size_t workspace_size,
                          cudaStream_t stream) {
    (void)handle, (void)description, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout;
    (void)beta, (void)c, (void)c_layout, (void)d, (void)d_layout, (void)algorithm;
    (void)workspace_size;
    note_workspace(stream, workspace);
    enqueue(stream, LAUNCHES);
    return SUCCESS;
}
