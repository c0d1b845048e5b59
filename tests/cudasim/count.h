/* count.h - bank conflicts and coalescing, for kernels compiled with -fsanitize=thread but without its runtime; see
 * count.cpp. */
#ifndef CUDASIM_COUNT_H
#define CUDASIM_COUNT_H

#include <string>

#include "cudasim_control.h"

namespace cudasim
{

bool count_read(const char *kernel, cudasim_access *access);
std::string count_json(); /* an array: a kernel each, with its worst places in the code */

} // namespace cudasim

#endif
