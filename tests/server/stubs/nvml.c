/* A management library for tests: it knows the GPU ...0002 only, and cannot read its power. */
#include <string.h>

typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory_info;

static int handle;

int nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }

const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Not Found"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &handle;
    return strcmp(uuid, "GPU-00000000-0000-0000-0000-000000000002") ? 6 : 0;
}

int nvmlDeviceGetUtilizationRates(void *device, utilization *rates) {
    (void)device;
    rates->gpu = 75;
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_info *info) {
    (void)device;
    info->total = 1000;
    info->used = 400;
    return 0;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { (void)device; (void)milliwatts; return 3; }

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {
    (void)device; (void)sensor;
    *degrees = 65;
    return 0;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
    (void)device;
    *reasons = 0x1 | 0x40; /* idle, and too hot */
    return 0;
}
