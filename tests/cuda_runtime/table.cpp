// cuBLAS and NCCL of a GPU that is not there, and the functions of CUDA that only succeed: see runtime.cpp.
// Arguments that are not read are not declared: the C ABIs of Linux pass them by.
#define API extern "C" __attribute__((visibility("default")))

// in runtime.cpp
API int cuda_launch(const char* name, void* stream);
API int cudaMemcpyAsync(void* to, void* from, unsigned long bytes, int kind, void* stream);

struct Handle {
  void* stream;
  char opaque[1024];  // descriptors of cublasLt, written through pointers
};

#define SUCCEEDS(name) \
  API int name() { return 0; }
#define CREATES(name) \
  API int name(Handle** result) { return *result = new Handle(), 0; }
#define GIVES(name, value) \
  API int name(int* result) { return *result = value, 0; }
#define WRITES(name, value) \
  API int name(void*, int* result) { return *result = value, 0; }
#define PRODUCT(name) \
  API int name(Handle* handle) { return cuda_launch(#name, handle->stream); }

// CUDA
GIVES(cudaGetDeviceCount, 1)
GIVES(cudaGetDevice, 0)
GIVES(cuDeviceGet, 0)
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
CREATES(cuModuleLoad)
CREATES(cuModuleLoadData)
SUCCEEDS(cuModuleUnload)

// cuBLAS
CREATES(cublasCreate_v2)
API int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, 0; }
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
WRITES(cublasGetMathMode, 0)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*,
                                       int* found) {
  return *found = 1, 0;
}
API int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                       void*, void*, unsigned long, void* stream) {
  return cuda_launch("cublasLtMatmul", stream);
}

// NCCL, of a process alone
GIVES(ncclGetVersion, 22800)
SUCCEEDS(ncclGetUniqueId)
CREATES(ncclCommInitRankConfig)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommFinalize)
WRITES(ncclCommGetAsyncError, 0)
API int ncclAllReduce(void*, void*, unsigned long, int, int, void*, void* stream) {
  return cuda_launch("ncclAllReduce", stream);
}
API int ncclAllGather(void* from, void* to, unsigned long count, int dtype, void*, void* stream) {
  int width = dtype < 2 ? 1 : dtype < 4 ? 4 : 8;  // int8, uint8; int32, uint32; the others are not gathered
  return cudaMemcpyAsync(to, from, count * width, 0, stream);
}
API int ncclBroadcast(void*, void*, long, int, int, void*, void* stream) {
  return cuda_launch("ncclBroadcast", stream);
}
