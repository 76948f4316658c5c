/* The functions of CUDA's runtime that torch calls although nothing runs on the device: one GPU, whose streams and events
   are always done. Nothing is computed. Pinned memory is real memory, and is known as pinned: the
   host waits for a copy from pageable memory. */
#include <stdlib.h>
#include <string.h>

static const size_t GPU_BYTES = 80UL << 30;
enum { PROCESSORS = 132, MAJOR = 9, MINOR = 0, BLOCK_BYTES = 232448, PROCESSOR_BYTES = 233472 }; /* of an H100 */
enum { HOST = 1, UNREGISTERED = 0 };

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = GPU_BYTES - (1UL << 30); *total = GPU_BYTES; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* numbers of cudaDeviceAttr */
    case 16: *value = PROCESSORS; break;
    case 75: *value = MAJOR; break;
    case 76: *value = MINOR; break;
    case 81: *value = PROCESSOR_BYTES; break;
    case 97: *value = BLOCK_BYTES; break;
    default: *value = 1;
  }
  return 0;
}

/* The begin of CUDA 13's cudaDeviceProp. */
struct properties {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t memory, block_bytes;
  int block_registers, warp;
  size_t pitch;
  int block_threads, block_size[3], grid_size[3];
  size_t constant_bytes;
  int major, minor;
  size_t texture_alignment, pitch_alignment;
  int processors;
};
int cudaGetDeviceProperties(struct properties *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 (simulated)");
  p->memory = GPU_BYTES;
  p->block_bytes = 49152;
  p->block_registers = 65536;
  p->warp = 32;
  p->block_threads = 1024;
  p->major = MAJOR;
  p->minor = MINOR;
  p->processors = PROCESSORS;
  return 0;
}

int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { static long n = 16; *stream = (void *)(n += 16); return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { static long n = 16; *event = (void *)(n += 16); return 0; }
int cudaEventElapsedTime(float *ms, void *begin, void *end) { *ms = 1; return 0; }

/* Pinned memory. */
static struct { char *begin; size_t bytes; } pinned[4096];
static int count;
static int note(void *begin, size_t bytes) {
  if (count == sizeof pinned / sizeof *pinned) return 2; /* out of memory */
  pinned[count].begin = begin, pinned[count++].bytes = bytes;
  return 0;
}
static void forget(void *begin) {
  for (int i = 0; i < count; i++)
    if (pinned[i].begin == (char *)begin) { pinned[i] = pinned[--count]; return; }
}
static int aligned(void **memory, size_t alignment, size_t bytes) { return posix_memalign(memory, alignment, bytes ? bytes : 1) ? 2 : 0; }
int cudaHostAlloc(void **memory, size_t bytes, unsigned flags) { return aligned(memory, 4096, bytes) || note(*memory, bytes); }
int cudaMallocHost(void **memory, size_t bytes) { return aligned(memory, 4096, bytes) || note(*memory, bytes); }
int cudaFreeHost(void *memory) { forget(memory); free(memory); return 0; }
int cudaHostRegister(void *memory, size_t bytes, unsigned flags) { return note(memory, bytes); }
int cudaHostUnregister(void *memory) { forget(memory); return 0; }
int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; return 0; }
struct attributes { int type, device; void *device_pointer, *host_pointer; };
int cudaPointerGetAttributes(struct attributes *a, const void *pointer) {
  memset(a, 0, sizeof *a);
  a->type = UNREGISTERED;
  a->host_pointer = a->device_pointer = (void *)pointer;
  for (int i = 0; i < count; i++)
    if ((char *)pointer >= pinned[i].begin && (char *)pointer < pinned[i].begin + pinned[i].bytes) a->type = HOST;
  return 0;
}

/* Device memory that torch allocates for itself, such as the state of its random generator. */
int cudaMalloc(void **memory, size_t bytes) { return aligned(memory, 512, bytes); }
int cudaMallocAsync(void **memory, size_t bytes, void *stream) { return aligned(memory, 512, bytes); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeAsync(void *memory, void *stream) { free(memory); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { memcpy(to, from, bytes); return 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
