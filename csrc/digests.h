// Digests of the sources that the kernels were built from, see CMakeLists.txt.
#ifndef IMF_DIGESTS
#define IMF_DIGESTS

namespace imf {

extern const char* const digest_of_cpu;
extern const char* const digest_of_cuda;

}  // namespace imf

#endif
