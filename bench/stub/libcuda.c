/* A CUDA driver that loads and launches nothing and says yes: what the host pays for a launch, without a GPU.
   Launches are counted. Of the last one, function, grid, block, shared memory and stream are kept, and as many of its
   arguments as `stub_expect` has said the sizes of. */
#include <stdint.h>
#include <string.h>

static char handle[4096]; /* what an address stands for is never looked at */
static long functions, launches, last;
static int expected, sizes[64];
static char handed[1024];
enum { NUMBERS = 28, STREAM = 32, CONFIG = 36 }; /* of CUlaunchConfig: numbers, padding, the stream */

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
  memcpy(handed, config, NUMBERS);
  memcpy(handed + NUMBERS, (const char *)config + STREAM, CONFIG - NUMBERS);
  for (int i = 0, at = CONFIG; i < expected; at += sizes[i++]) memcpy(handed + at, parameters[i], sizes[i]);
  return 0;
}

SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)

void stub_expect(const int *each, int count) { memcpy(sizes, each, (expected = count) * sizeof *sizes); }
const char *stub_handed(void) { return handed; }
long stub_launches(void) { return launches; }
long stub_last_function(void) { return last; }
