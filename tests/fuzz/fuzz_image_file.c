/* fuzz_image_file.c - any bytes are an image of a sane size, or refused with a sentence. */
#include "image_file.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *rgb = NULL;
    char *record = NULL, why[256] = "";
    int width = 0, height = 0;
    if (!image_file_decode(&rgb, &width, &height, &record, data, size, why, sizeof why)) {
        if (!why[0])
            abort();
        return 0;
    }
    /* All the pixels there should be can be read. */
    uint64_t sum = 0;
    for (size_t i = 0; i < (size_t)width * (size_t)height * 3; i++)
        sum += rgb[i];
    if (sum > UINT64_C(765) * IMAGE_FILE_PIXELS_MAX || width > IMAGE_FILE_SIDE_MAX || height > IMAGE_FILE_SIDE_MAX || (record && strlen(record) > size * 1100))
        abort();
    free(rgb);
    free(record);
    return 0;
}
