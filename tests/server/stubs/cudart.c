/* A CUDA runtime for tests: the device's memory is the host's, and a copy is done when it is asked for.
 *
 * stub_fail("cudaMalloc", 2) lets the next such call fail with that code; stub_live() counts what is not released.
 */
#include <stdlib.h>
#include <string.h>

static const char *failing;
static int failing_code, live;

static int code_of(const char *function) {
    if (!failing || strcmp(failing, function)) return 0;
    failing = 0;
    return failing_code;
}

void stub_fail(const char *function, int code) { failing = strdup(function); failing_code = code; }

int stub_live(void) { return live; }

const char *cudaGetErrorString(int code) {
    return code == 1 ? "invalid argument" : code == 2 ? "out of memory" : "unspecified launch failure";
}

int cudaSetDevice(int device) { (void)device; return code_of("cudaSetDevice"); }

static int allocate(const char *function, void **address, size_t bytes) {
    int code = code_of(function);
    if (code) return code;
    *address = malloc(bytes);
    __sync_fetch_and_add(&live, 1);
    return 0;
}

static int release(void *address) {
    free(address);
    __sync_fetch_and_sub(&live, 1);
    return 0;
}

int cudaMalloc(void **address, size_t bytes) { return allocate("cudaMalloc", address, bytes); }

int cudaFree(void *address) { return release(address); }

int cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    return allocate("cudaHostAlloc", address, bytes);
}

int cudaFreeHost(void *address) { return release(address); }

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    (void)flags;
    return allocate("cudaStreamCreateWithFlags", stream, 1);
}

int cudaStreamDestroy(void *stream) { return release(stream); }

int cudaStreamSynchronize(void *stream) { (void)stream; return code_of("cudaStreamSynchronize"); }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    int code = code_of("cudaMemcpyAsync");
    if (code) return code;
    if (!stream || kind < 1 || kind > 2) return 1;
    memcpy(to, from, bytes);
    return 0;
}
