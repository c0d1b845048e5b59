/* fuzz_msg.c - any bytes as a message: the first two are the head, the rest the body.
 *
 * What decodes must encode again, decode to the same bytes, and hold the promises of msg.h: texts are there,
 * lists are within their limits. */
#include "msg.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct msg m, again;
    uint8_t head[2], second_head[2];
    void *body, *second;
    size_t bytes, second_bytes;
    char why[256];
    size_t head_bytes = size < 2 ? size : 2;
    if (!msg_decode(&m, data, head_bytes, data + head_bytes, size - head_bytes, why, sizeof why))
        return 0;
    if (m.kind == MSG_ASSIGN && (m.assign.count > MSG_ITEMS_MAX || !m.assign.campaign || !m.assign.out_dir))
        abort();
    for (uint32_t i = 0; m.kind == MSG_ASSIGN && i < m.assign.count; i++)
        if (!m.assign.tasks[i].prompt || strlen(m.assign.tasks[i].prompt) > MSG_PROMPT_MAX)
            abort();
    if (!msg_encode(&m, head, &body, &bytes, why, sizeof why) || !msg_decode(&again, head, 2, body, bytes, why, sizeof why) ||
        !msg_encode(&again, second_head, &second, &second_bytes, why, sizeof why))
        abort();
    if (bytes != second_bytes || memcmp(body, second, bytes) != 0)
        abort();
    free(body);
    free(second);
    msg_done(&m);
    msg_done(&again);
    return 0;
}
