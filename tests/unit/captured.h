/* captured.h - what a piece of code prints, for tests of commands: a descriptor points to a nameless file meanwhile.
 *
 *   int saved = captured_begin(STDOUT_FILENO);
 *   ...
 *   captured_end(STDOUT_FILENO, saved, text, sizeof text);     stdio is the caller's to flush, before both */
#ifndef KILN_CAPTURED_H
#define KILN_CAPTURED_H

#include <stdlib.h>
#include <unistd.h>

static inline int captured_begin(int fd)
{
    char name[] = "/tmp/kiln-test-out.XXXXXX";
    int file = mkstemp(name), saved = dup(fd);
    unlink(name);
    dup2(file, fd);
    close(file);
    return saved;
}

static inline void captured_end(int fd, int saved, char *ret, size_t bytes)
{
    ssize_t got = pread(fd, ret, bytes - 1, 0);
    ret[got > 0 ? got : 0] = 0;
    dup2(saved, fd);
    close(saved);
}

#endif
