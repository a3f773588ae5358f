/* A driver library for tests: as many GPUs, and such a version of CUDA, as the environment says. */
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { (void)flags; return number("STUB_INIT", 0); }

int cuDeviceGetCount(int *count) { *count = number("STUB_COUNT", 1); return 0; }

int cuDriverGetVersion(int *version) { *version = number("STUB_CUDA", 13000); return 0; }

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < number("STUB_COUNT", 1) ? 0 : 101; }

int cuDeviceGetUuid(unsigned char *uuid, int device) {
    memset(uuid, 0, 16);
    uuid[15] = (unsigned char)(device + 1);
    return 0;
}
