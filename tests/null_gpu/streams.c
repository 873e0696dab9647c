// Streams, events, captures and graphs: who waits for whom, and what a capture forbids.
//
// The rules are those of the CUDA C++ Programming Guide, "Creating a Graph Using Stream Capture":
// a stream that waits for an event of a capture joins it; every stream that joined must be joined
// back before the capture ends; nobody waits for, or asks about, what is being captured; calls
// that would touch the whole device are forbidden to all threads, or (thread_local) to the
// capturing one.
//
// The device is as slow as can be: an event has not happened before the host has waited for it, or
// for a later one. Memory that other streams may still read is then never given out again, as it
// must not. Its clock counts what was put on streams: the fewer kernels, the faster.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

#define MAX_BRANCHES 64    // streams of one capture
#define MAX_WORKSPACES 32  // of cuBLAS, in one capture
#define MAX_CAPTURES 4096
#define OPERATION_MS 0.005f  // that a kernel or copy takes by the device's clock

// How far each branch of a capture has come, as one stream or event knows it.
struct progress {
    unsigned done[MAX_BRANCHES];
};

struct CUgraph_st {
    long nodes;
};

struct CUgraphExec_st {
    long nodes;
};

struct capture {
    cudaStream_t origin;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    cudaError_t invalidated_by;
    int under_way, branches, num_workspaces;
    struct progress now;
    long nodes;
    void *workspaces[MAX_WORKSPACES];
};

struct CUstream_st {
    struct capture *capture;  // NULL: none
    int branch;
    struct progress seen;
};

struct CUevent_st {
    struct capture *capture;  // in which it was recorded last; NULL: outside of any
    long recorded;            // number of that record, from 1; 0: never
    long operations;          // that were put on any stream before it
    struct progress seen;
};

static pthread_mutex_t mutex;
static struct CUstream_st legacy_stream;
static struct capture *captures[MAX_CAPTURES];  // all there ever were: they are asked about later
static int num_captures, num_under_way;
static long num_records, num_awaited;  // of events; the host has waited for the first num_awaited
static long num_operations;            // put on streams so far, replayed nodes among them
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

__attribute__((constructor)) static void make_mutex(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&mutex, &attributes);
}

static void lock(void) { pthread_mutex_lock(&mutex); }

// Releases the lock and passes an error on.
static cudaError_t done(cudaError_t error) {
    pthread_mutex_unlock(&mutex);
    return failed(error);
}

static cudaStream_t actual(cudaStream_t stream) {
    int is_legacy = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
    return is_legacy ? &legacy_stream : stream;
}

// The capture that a stream is part of, NULL for none. Streams that joined one leave it when it
// ends; as nobody keeps a list of them, each finds out when it is asked next.
static struct capture *capture_of(cudaStream_t stream) {
    stream = actual(stream);
    if (stream->capture && !stream->capture->under_way) stream->capture = NULL;
    return stream->capture;
}

static void merge(struct progress *into, const struct progress *from) {
    for (int i = 0; i < MAX_BRANCHES; i++)
        if (from->done[i] > into->done[i]) into->done[i] = from->done[i];
}

// A call that breaks a rule spoils the capture: it cannot end well any more.
static cudaError_t spoil(struct capture *capture, cudaError_t error, const char *call,
                         const char *why) {
    violation("%s: %s", call, why);
    if (!capture->invalidated_by) capture->invalidated_by = error;
    return error;
}

static void join(cudaStream_t stream, struct capture *capture) {
    if (capture->branches == MAX_BRANCHES) abort();
    memset(&stream->seen, 0, sizeof stream->seen);
    stream->capture = capture;
    stream->branch = capture->branches++;
}

static void wait_until(long record) {
    lock();
    if (record > num_awaited) num_awaited = record;
    pthread_mutex_unlock(&mutex);
}

int enqueue(cudaStream_t stream, enum count which) {
    lock();
    stream = actual(stream);
    struct capture *capture = capture_of(stream);
    if (capture) {
        capture->nodes++;
        stream->seen.done[stream->branch] = ++capture->now.done[stream->branch];
    } else {
        if (num_under_way) count(STRAYS, 1);
        count(which, 1);
        num_operations++;
    }
    pthread_mutex_unlock(&mutex);
    return capture != NULL;
}

cudaError_t check_no_capture(const char *call) {
    cudaError_t error = cudaSuccess;
    lock();
    for (int i = 0; num_under_way && i < num_captures; i++) {
        struct capture *capture = captures[i];
        if (!capture->under_way || thread_mode == cudaStreamCaptureModeRelaxed) continue;
        int own = pthread_equal(pthread_self(), capture->thread);
        if (capture->mode == cudaStreamCaptureModeGlobal ||
            (capture->mode == cudaStreamCaptureModeThreadLocal && own))
            error = spoil(capture, cudaErrorStreamCaptureUnsupported, call,
                          "not permitted while a capture is under way");
    }
    pthread_mutex_unlock(&mutex);
    return error;
}

void note_workspace(cudaStream_t stream, void *workspace) {
    lock();
    struct capture *capture = capture_of(stream);
    if (capture && workspace) {
        int i = 0;
        while (i < capture->num_workspaces && capture->workspaces[i] != workspace) i++;
        if (i == MAX_WORKSPACES) abort();
        capture->workspaces[i] = workspace;
        if (i == capture->num_workspaces) capture->num_workspaces++;
    }
    pthread_mutex_unlock(&mutex);
}

// Streams ---------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags,
                                                int priority) {
    (void)flags, (void)priority;
    *stream = calloc(1, sizeof **stream);
    return *stream ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    count(SYNCS, 1);
    lock();
    struct capture *capture = capture_of(stream);
    if (capture)
        return done(spoil(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize",
                          "the stream is being captured"));
    pthread_mutex_unlock(&mutex);
    wait_until(num_records);
    return failed(check_no_capture("cudaStreamSynchronize"));
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    count(SYNCS, 1);
    wait_until(num_records);
    return failed(check_no_capture("cudaDeviceSynchronize"));
}

EXPORT CUresult cuCtxSynchronize(void) { return (CUresult)cudaDeviceSynchronize(); }

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    return (CUresult)cudaStreamSynchronize(stream);
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    lock();
    struct capture *capture = capture_of(stream);
    cudaError_t error = cudaSuccess;
    if (capture)
        error = spoil(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery",
                      "the stream is being captured");
    return done(error);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    lock();
    stream = actual(stream);
    struct capture *ours = capture_of(stream), *theirs = event->capture;
    if (theirs && !theirs->under_way) theirs = NULL;
    cudaError_t error = cudaSuccess;
    if (ours && theirs && ours != theirs)
        error = spoil(ours, cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent",
                      "the event belongs to another capture");
    else if (ours && !theirs && event->recorded)
        error = spoil(ours, cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent",
                      "the event was recorded outside of the capture");
    else if (theirs) {
        if (!ours) join(stream, theirs);
        merge(&stream->seen, &event->seen);
    }
    return done(error);
}

// Events ----------------------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    return *event ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    lock();
    stream = actual(stream);
    event->capture = capture_of(stream);
    event->seen = stream->seen;
    event->recorded = ++num_records;
    event->operations = num_operations;
    return done(cudaSuccess);
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                            unsigned flags) {
    (void)flags;
    return cudaEventRecord(event, stream);
}

static cudaError_t look_at(cudaEvent_t event, const char *call) {
    lock();
    struct capture *capture = event->capture;
    if (capture && capture->under_way)
        return done(spoil(capture, cudaErrorCapturedEvent, call, "the event is being captured"));
    pthread_mutex_unlock(&mutex);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    cudaError_t error = look_at(event, "cudaEventQuery");
    if (!error) error = check_no_capture("cudaEventQuery");
    if (!error && event->recorded > num_awaited) error = cudaErrorNotReady;
    return failed(error);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    count(SYNCS, 1);
    cudaError_t error = look_at(event, "cudaEventSynchronize");
    if (!error) error = check_no_capture("cudaEventSynchronize");
    if (!error) wait_until(event->recorded);
    return failed(error);
}

EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    // never zero: torch and Triton divide by it
    *milliseconds = OPERATION_MS * (float)(1 + end->operations - start->operations);
    return cudaSuccess;
}

// Captures --------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    lock();
    stream = actual(stream);
    if (stream == &legacy_stream) {
        violation("cudaStreamBeginCapture: the default stream cannot be captured");
        return done(cudaErrorStreamCaptureUnsupported);
    }
    if (capture_of(stream)) return done(cudaErrorIllegalState);
    struct capture *capture = calloc(1, sizeof *capture);
    if (!capture || num_captures == MAX_CAPTURES) abort();
    capture->origin = stream;
    capture->mode = mode;
    capture->thread = pthread_self();
    capture->under_way = 1;
    captures[num_captures++] = capture;
    num_under_way++;
    join(stream, capture);
    return done(cudaSuccess);
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    lock();
    struct capture *capture = capture_of(stream);
    *graph = NULL;
    if (!capture || actual(stream) != capture->origin) return done(cudaErrorIllegalState);
    for (int i = 0; i < capture->branches; i++)
        if (actual(stream)->seen.done[i] < capture->now.done[i] && !capture->invalidated_by)
            spoil(capture, cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture",
                  "a stream that joined the capture has not been joined back");
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        !pthread_equal(pthread_self(), capture->thread) && !capture->invalidated_by)
        spoil(capture, cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture",
              "another thread began the capture");
    capture->under_way = 0;
    num_under_way--;
    actual(stream)->capture = NULL;
    if (capture->invalidated_by) return done(cudaErrorStreamCaptureInvalidated);
    *graph = calloc(1, sizeof **graph);
    if (!*graph) return done(cudaErrorMemoryAllocation);
    (*graph)->nodes = capture->nodes;
    return done(cudaSuccess);
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                         enum cudaStreamCaptureStatus *status) {
    return cudaStreamGetCaptureInfo(stream, status, NULL, NULL, NULL, NULL, NULL);
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    static struct CUgraph_st unfinished;
    lock();
    struct capture *capture = capture_of(stream);
    *status = !capture ? cudaStreamCaptureStatusNone
              : capture->invalidated_by ? cudaStreamCaptureStatusInvalidated
                                        : cudaStreamCaptureStatusActive;
    if (id) {
        *id = 0;
        for (int i = 0; capture && i < num_captures; i++)
            if (captures[i] == capture) *id = i + 1;
    }
    if (graph) *graph = &unfinished;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return done(cudaSuccess);
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

// Graphs ----------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                        unsigned long long flags) {
    (void)flags;
    *exec = calloc(1, sizeof **exec);
    if (!*exec) return failed(cudaErrorMemoryAllocation);
    (*exec)->nodes = graph->nodes;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                                 unsigned long long flags) {
    return cudaGraphInstantiate(exec, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    lock();
    if (!enqueue(stream, GRAPH_LAUNCHES)) {
        count(GRAPH_NODES, exec->nodes);
        num_operations += exec->nodes;
    }
    return done(cudaSuccess);
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (nodes) memset(nodes, 0, *count * sizeof *nodes);
    *count = graph->nodes;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *before,
                                                cudaGraphEdgeData *edges, size_t *count) {
    (void)node, (void)before, (void)edges;
    *count = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    free(exec);
    return cudaSuccess;
}

// Questions of the tests ------------------------------------------------------------------------

EXPORT int null_gpu_captures(void) { return num_captures; }

EXPORT long null_gpu_nodes(int capture) { return captures[capture]->nodes; }

EXPORT int null_gpu_workspaces(int capture, void **workspaces, int most) {
    int number = captures[capture]->num_workspaces;
    for (int i = 0; i < number && i < most; i++) workspaces[i] = captures[capture]->workspaces[i];
    return number;
}
