/* A CUDA driver that loads and launches nothing and says yes: what the host pays for a launch, without a GPU.
   Launches are counted, and the last function that was launched is kept. */
#include <stdint.h>

static char handle[4096]; /* what an address stands for is never looked at */
static long functions, launches, last;

#define SUCCEEDS(name) int name(void) { return 0; }

int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuCtxGetCurrent(void **context) { *context = handle; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = handle; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = handle; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = handle + ++functions; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t address) { *(uint64_t *)data = address; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; } /* of shared memory */

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launches++;
  last = (char *)function - handle;
  return 0;
}

SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)

long stub_launches(void) { return launches; }
long stub_last_function(void) { return last; }
