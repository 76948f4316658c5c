/* The functions of CUDA's driver that torch and Triton call although nothing runs on the device. */
#include <stddef.h>

static const unsigned long long FIRST_ADDRESS = 1ULL << 52; /* of the device's tensors; no address of the host is as high */
enum { PROCESSORS = 132, PROCESSOR_BYTES = 233472, BLOCK_BYTES = 232448, INVALID_VALUE = 1 }; /* of an H100 */
static int context, module, function;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the simulated GPU"; return 0; }
/* Autograd's threads ask which devices have a context, for tensors without data too. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int device) { *c = &context; return 0; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = &module; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &function; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *f) { *value = attribute == 0 ? 1024 : 0; return 0; } /* threads */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* numbers of CUdevice_attribute */
    case 16: *value = PROCESSORS; break;
    case 81: *value = PROCESSOR_BYTES; break;
    case 97: *value = BLOCK_BYTES; break;
    default: *value = 1;
  }
  return 0;
}
/* Triton's launcher asks this for each tensor, and refuses those of the host. */
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;
  return pointer < FIRST_ADDRESS ? INVALID_VALUE : 0;
}
/* Triton's launcher ends here, having read each argument with the type that the kernel was compiled for. */
struct launch { unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes; };
int cuLaunchKernelEx(const struct launch *l, void *f, void **arguments, void **extra) {
  int fits = l->grid_x <= 0x7fffffff && l->grid_y <= 65535 && l->grid_z <= 65535;
  return fits && l->block_x * l->block_y * l->block_z <= 1024 && l->shared_bytes <= BLOCK_BYTES ? 0 : INVALID_VALUE;
}
