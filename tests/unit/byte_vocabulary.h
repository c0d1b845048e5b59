/* byte_vocabulary.h - the smallest vocab.json, for the tokenizer's test and its fuzzer. */
#ifndef KILN_BYTE_VOCABULARY_H
#define KILN_BYTE_VOCABULARY_H

#include <stdbool.h>
#include <stdio.h>

#define BYTE_VOCABULARY_MAX 8192

/* The 256 bytes, ids in byte order, in the alphabet of such files (GPT-2's); "ab" and "abc"; and what `more` adds. */
static inline void byte_vocabulary(char to[BYTE_VOCABULARY_MAX], const char *more)
{
    int next = 256;
    to += sprintf(to, "{");
    for (int b = 0; b < 256; b++) {
        bool is_self = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        int c = is_self ? b : next++;
        if (c < 128)
            to += sprintf(to, c == '"' || c == '\\' ? "\"\\%c\":%d," : "\"%c\":%d,", c, b);
        else
            to += sprintf(to, "\"%c%c\":%d,", 0xc0 | c >> 6, 0x80 | (c & 63), b);
    }
    sprintf(to, "\"ab\":256,\"abc\":257%s}", more);
}

#endif
