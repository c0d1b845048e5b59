/* inject.h - every API call passes here: it is counted, may be made to fail, and a failed device answers with its error.
 *
 * A fault is POINT:N[=ERROR][@DEVICE|@RANK][*TIMES]; several with commas between; N counts from 1, calls of that point.
 *   malloc hostalloc launch copy sync stream event graph blas nccl     the N-th such call fails (once, or TIMES times)
 *   any        the N-th call of the whole API fails
 *   lost       at the N-th call the device is lost: this and every later call on it answers ERROR
 *              (cudaErrorDevicesUnavailable unless given)
 *   kernel     the N-th kernel that runs fails on the device: ERROR (cudaErrorLaunchFailure unless given) is sticky and
 *              seen at the next synchronisation, not at the launch; cudaErrorECCUncorrectable for a memory fault
 *   stuck      the N-th kernel never ends, or ends the device after CUDASIM_KERNEL_LIMIT_MS
 *   long       the N-th kernel takes MS more: long:N=MS
 *   hang       the N-th call of all returns, and does nothing before, MS later: hang:N=MS
 *   absent     the rank never comes to its N-th communicator
 *   dead       the rank stops answering at its N-th collective;   slow:N=MS   each from the N-th takes MS more
 *   wrong      the rank's N-th collective gives a wrong sum */
#ifndef CUDASIM_INJECT_H
#define CUDASIM_INJECT_H

#include <cuda_runtime_api.h>

#include <string>

namespace cudasim
{

enum class Point { OTHER, MALLOC, HOSTALLOC, LAUNCH, COPY, SYNC, STREAM, EVENT, GRAPH, BLAS, NCCL };

/* enter: the call may go on (cudaSuccess), or what it must return. Call it first, with the function's name. */
cudaError_t enter(Point point, const char *function);

/* refuse notes the error for cudaGetLastError and returns it; with a sentence for cudasim_error. */
cudaError_t refuse(cudaError_t code);
cudaError_t refuse(cudaError_t code, const std::string &sentence);
cudaError_t take_last_error();
cudaError_t peek_last_error();

/* What happens to the kernel that is about to run on the device. */
struct KernelFault {
    enum Kind { NONE, FAILS, STUCK } kind;
    cudaError_t code;
    long delay_ms;
};
KernelFault inject_kernel(int device);

/* What happens to the collective this rank is about to run. */
struct RankFault {
    bool is_dead, is_wrong;
    long delay_ms;
};
RankFault inject_rank(int rank);

/* Does this rank stay away from the communicator it is to join? */
bool inject_absent(int rank);

bool inject_set(const std::string &list, std::string *why);

} // namespace cudasim

#endif
