// A GPU that is not there: a CUDA runtime and driver on which PyTorch and Triton run, but no kernel does.
//
// Preloaded, this file takes the place of libcudart and libcuda, and table.cpp that of cuBLAS and NCCL.
// Functions in neither are NVIDIA's, which fail, as there is no driver. The host's part is as on a GPU:
// allocations, the order of streams and events, what a capture refuses. Numbers mean nothing: no kernel
// writes the device's memory, which is the host's, copies of more than 64 KiB move nothing, and streams have
// always done their work.
//
// Each launch, copy and wait is a line of the log: kind, place and name, separated by tabs. Kinds: launch,
// copy, wait, capture (that began), refused (by a capture). Places, while a stream is captured: "inside" and
// "outside".
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

static_assert(CUDART_VERSION >= 13000 && CUDART_VERSION < 14000, "written for the functions of CUDA 13");
#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Stream {
  int capture = 0;  // that it is part of; 0: none
  long last = 0;    // operation
  long joined = 0;  // operation for which another stream of the capture waits
};
struct Event {
  Stream* stream = nullptr;  // on which it was recorded, and then
  int capture = 0;           // its capture
  long last = 0;             // and its last operation
};
struct Graph {
  size_t nodes = 0;
};

std::recursive_mutex mutex;
std::string written;  // the log
// Called by the thread that asked with each line of the log, but for launches that are not outside of a
// capture.
void (*watcher)(const char*);
std::unordered_map<const void*, std::string> kernels;
std::map<char*, size_t> allocated, pinned;
const size_t ARENA = size_t(1) << 42, CARD = size_t(80) << 30;  // bytes: of addresses, and of an H100
const size_t SMALL = 1 << 16;  // bytes of copies that move data: sizes and indices that the host reads back
char* const arena = static_cast<char*>(
    mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
size_t offset = 0, used = 0;
Stream legacy, *origin = nullptr;  // the default stream; that of the capture
std::vector<Stream*> streams;
int captures = 0;
long operations = 0;
Graph* graph = nullptr;  // being captured
cudaStreamCaptureMode strictness;
thread_local bool capturer = false;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

// 0, 1 and 2 are the default stream.
Stream& of(cudaStream_t s) { return size_t(s) <= 2 ? legacy : *reinterpret_cast<Stream*>(s); }
bool capturing(const Stream& s) { return graph && s.capture == captures; }
bool within(const std::map<char*, size_t>& ranges, const void* p) {
  auto next = ranges.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  return next != ranges.begin() && p < std::prev(next)->first + std::prev(next)->second;
}
bool on_device(const void* p) { return p >= arena && p < arena + ARENA; }

void log(const std::string& kind, const std::string& name, const Stream* s = nullptr) {
  std::string line;
  {
    std::lock_guard lock(mutex);
    line = kind + '\t' + (graph && s ? capturing(*s) ? "inside" : "outside" : "") + '\t' + name;
    written += line + '\n';
  }
  if (watcher && (kind != "launch" || line.find("outside") != line.npos)) watcher(line.c_str());
}

// The work of a stream: a kernel, a copy.
void enqueue(Stream& s) {
  std::lock_guard lock(mutex);
  s.last = ++operations;
  if (capturing(s)) graph->nodes++;
}

cudaError_t launch(const std::string& name, Stream& s) {
  enqueue(s);
  log("launch", name, &s);
  return cudaSuccess;
}

// For calls that a capture forbids to its thread, or to all, unless the thread has said that it knows.
cudaError_t unless_capturing(const char* name) {
  if (!graph || mode == cudaStreamCaptureModeRelaxed || strictness == cudaStreamCaptureModeRelaxed)
    return cudaSuccess;
  if (strictness == cudaStreamCaptureModeThreadLocal && !capturer) return cudaSuccess;
  log("refused", name);
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t wait(const char* name) {
  log("wait", name);
  return unless_capturing(name);
}

cudaError_t copy(void* to, const void* from, size_t bytes, Stream& s) {
  bool reads = on_device(from), writes = on_device(to);
  std::string host;
  {
    std::lock_guard lock(mutex);
    host = within(pinned, reads ? to : from) ? ", pinned" : ", pageable";
  }
  if (bytes <= SMALL || !(reads || writes)) memmove(to, from, bytes);
  if (reads && writes) return launch("copy within the device", s);
  enqueue(s);
  log("copy", (reads ? "from the device" : writes ? "to the device" : "on the host") + host, &s);
  return capturing(s) && host == ", pageable" ? unless_capturing("copy of pageable memory") : cudaSuccess;
}

// Of an H100: what PyTorch and Triton ask for, by numbers that the runtime and the driver share.
int attribute(int which) {
  static const std::map<int, int> values = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
  };
  auto found = values.find(which);
  return found == values.end() ? 0 : found->second;
}

}  // namespace

// For the tests. The log since the last call; valid until the next.
API const char* cuda_log() {
  static std::string result;
  std::lock_guard lock(mutex);
  result.clear();
  result.swap(written);
  return result.c_str();
}
API void cuda_watch(void (*function)(const char*)) { watcher = function; }
API int cuda_launch(const char* name, cudaStream_t s) { return launch(name, of(s)); }  // for table.cpp

// The card.
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
  return *least = 0, *most = -5, cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "a GPU that is not there");
  p->major = attribute(cudaDevAttrComputeCapabilityMajor);
  p->totalGlobalMem = CARD, p->l2CacheSize = 50 << 20;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] =
      attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  return cudaSuccess;
}

// Memory.
API cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (cudaError_t error = unless_capturing("cudaMalloc")) return error;
  std::lock_guard lock(mutex);
  bytes = (bytes + 511) / 512 * 512;
  if (arena == MAP_FAILED || used + bytes > CARD || offset + bytes > ARENA) return cudaErrorMemoryAllocation;
  *p = arena + offset;
  allocated[arena + offset] = bytes, offset += bytes, used += bytes;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  if (cudaError_t error = unless_capturing("cudaFree")) return error;
  std::lock_guard lock(mutex);
  if (auto found = allocated.find(static_cast<char*>(p)); found != allocated.end())
    used -= found->second, allocated.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  std::lock_guard lock(mutex);
  return *left = CARD - used, *total = CARD, cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  if (cudaError_t error = unless_capturing("cudaHostAlloc")) return error;
  std::lock_guard lock(mutex);
  *p = aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
  pinned[static_cast<char*>(*p)] = bytes + 1;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  std::lock_guard lock(mutex);
  pinned.erase(static_cast<char*>(p));
  free(p);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* result, const void* p) {
  std::lock_guard lock(mutex);
  *result = {};
  result->type = on_device(p)        ? cudaMemoryTypeDevice
                 : within(pinned, p) ? cudaMemoryTypeHost
                                     : cudaMemoryTypeUnregistered;
  result->devicePointer = result->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return copy(to, from, n, of(s));
}
API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t s) { return launch("memset", of(s)); }

// Streams and events.
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  std::lock_guard lock(mutex);
  streams.push_back(new Stream);
  return *s = reinterpret_cast<cudaStream_t>(streams.back()), cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  return *e = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete reinterpret_cast<Event*>(e), cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
API cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return unless_capturing("cudaStreamQuery"); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return unless_capturing("cudaEventQuery"); }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  std::lock_guard lock(mutex);
  Stream& s = of(stream);
  *reinterpret_cast<Event*>(event) = {&s, capturing(s) ? captures : 0, s.last};
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Stream& s = of(stream);
  Event& e = *reinterpret_cast<Event*>(event);
  {
    std::lock_guard lock(mutex);
    bool outside = !graph || e.capture != captures;
    if (outside && (!capturing(s) || !e.stream || flags & cudaEventWaitExternal)) return cudaSuccess;
    if (!outside) {  // the stream that waits becomes part of the capture
      if (&s != e.stream) e.stream->joined = std::max(e.stream->joined, e.last);
      if (s.capture != captures) s = {captures, 0, 0};
      return cudaSuccess;
    }
  }
  return log("refused", "a wait for an event from outside of the capture"), cudaErrorStreamCaptureIsolation;
}

// Captures and graphs.
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  return std::swap(mode, *other), cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  std::lock_guard lock(mutex);
  *status = capturing(of(s)) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* result,
                                         const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                         size_t* count) {
  if (id) *id = captures;
  if (result) *result = reinterpret_cast<cudaGraph_t>(graph);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode how) {
  log("capture", "began");
  std::lock_guard lock(mutex);
  graph = new Graph, origin = &of(s), strictness = how, capturer = true;
  *origin = {++captures, 0, 0};
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* result) {
  bool unjoined = false;
  {
    std::lock_guard lock(mutex);
    for (Stream* s : streams) unjoined |= s != origin && capturing(*s) && s->joined < s->last;
    *result = reinterpret_cast<cudaGraph_t>(unjoined ? nullptr : graph);
    graph = nullptr, capturer = false;
  }
  if (unjoined) log("refused", "a stream that the capture does not wait for");
  return unjoined ? cudaErrorStreamCaptureUnjoined : cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) {
  return *n = reinterpret_cast<Graph*>(g)->nodes, cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* result, cudaGraph_t g, unsigned long long) {
  return *result = reinterpret_cast<cudaGraphExec_t>(g), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) { return launch("graph", of(s)); }

// Kernels of PyTorch.
API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                                void*, int*) {
  kernels[host] = name;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(f)), cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(kernels.at(f), of(s));
}
namespace {
thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;  // of f<<<...>>>()
}  // namespace
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
  return configuration = {grid, block, shared, s}, 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* s) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<cudaStream_t*>(s) = configuration.stream;
  return cudaSuccess;
}

// The driver, for Triton: its kernels are handles that hold their name.
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
  return *f = reinterpret_cast<CUfunction>(new std::string(name)), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* result, CUpointer_attribute, CUdeviceptr p) {
  return *static_cast<CUdeviceptr*>(result) = p, CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  return launch(*reinterpret_cast<std::string*>(f), of(c->hStream)), CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            unsigned, CUstream s, void**, void**) {
  return launch(*reinterpret_cast<std::string*>(f), of(s)), CUDA_SUCCESS;
}
