/* image_file.c - PNG, JPEG and WebP with the record of how the image came to be.
 *
 * Encoders are called with fixed settings and no time stamps, so the same pixels and record give the same bytes.
 * WebP is lossless: an image set that is to be trained on or compared must not depend on an encoder's taste; who
 * wants small files takes JPEG. Decoders get bytes from anywhere: sizes are checked before memory is taken,
 * a warning of the JPEG decoder counts as damage. */
#include "image_file.h"

#include "json_text.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h> /* after stdio.h, which it needs */
#include <spng.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <webp/decode.h>
#include <webp/encode.h>
#include <webp/mux.h>

#define PNG_CHUNK_MAX (8u << 20)   /* what a text chunk may unpack to */
#define JPEG_SEGMENT_MAX 65533     /* bytes of a segment behind its length */
#define JPEG_SCANS_MAX 200         /* a progressive file of many empty scans costs hours */
#define RECORD_MARKER (JPEG_APP0 + 4)
#define RECORD_TAG "kiln"          /* with its NUL; then index and count of the piece */

static const char XMP_TAG[] = "http://ns.adobe.com/xap/1.0/"; /* with its NUL */
static const char XMP[] =
    "<?xpacket begin=\"\xEF\xBB\xBF\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>"
    "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">"
    "<rdf:Description rdf:about=\"\" xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\">"
    "<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end=\"r\"?>";

__attribute__((format(printf, 3, 4))) static bool refuse(char *why, size_t why_bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(why, why_bytes, format, args);
    va_end(args);
    return false;
}

/* --- formats ---------------------------------------------------------------------------------------- */

const char *image_file_format_name(enum image_format f)
{
    static const char *const names[] = {"png", "jpg", "webp"};
    return names[f];
}

bool image_file_format_of(const char *name, enum image_format *ret)
{
    static const struct {
        const char *name;
        enum image_format format;
    } known[] = {{"png", IMAGE_PNG}, {"jpg", IMAGE_JPG}, {"jpeg", IMAGE_JPG}, {"webp", IMAGE_WEBP}};
    const char *dot = strrchr(name, '.'), *slash = strrchr(name, '/');
    const char *ending = dot && (!slash || dot > slash) ? dot + 1 : name;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcasecmp(ending, known[i].name) == 0) {
            *ret = known[i].format;
            return true;
        }
    return false;
}

/* --- the record -------------------------------------------------------------------------------------- */

/* A value of the last line ends at a comma and a key at a colon, unless the value is a JSON string. */
static void put_value(struct json_text *t, const char *key, const char *value)
{
    json_text_put(t, key);
    if (strpbrk(value, ",:\n\r\"") || value[0] == ' ' || !*value)
        json_text_text(t, value);
    else
        json_text_put(t, value);
}

static const char *or_empty(const char *s)
{
    return s ? s : "";
}

/* A1111's layout: prompt, negative prompt, one line of settings that counts when it has at least three pairs. */
static void put_parameters(struct json_text *t, const struct image_record *r)
{
    json_text_put(t, or_empty(r->prompt));
    if (*or_empty(r->negative)) {
        json_text_put(t, "\nNegative prompt: ");
        json_text_put(t, r->negative);
    }
    json_text_format(t, "\nSteps: %d, Sampler: Euler", r->steps);
    if (isfinite(r->guidance)) {
        json_text_put(t, ", CFG scale: ");
        json_text_double(t, r->guidance);
    }
    json_text_format(t, ", Seed: %" PRIu64 ", Size: %dx%d", r->seed, r->width, r->height);
    if (*or_empty(r->digest))
        json_text_format(t, ", Model hash: %.10s", r->digest);
    if (*or_empty(r->model))
        put_value(t, ", Model: ", r->model);
    if (*or_empty(r->software))
        put_value(t, ", Version: ", r->software);
}

static void put_member(struct json_text *t, const char *name, const char *value)
{
    json_text_format(t, "\"%s\":", name);
    json_text_text(t, value);
    json_text_put(t, ",");
}

static void put_record(struct json_text *t, const struct image_record *r)
{
    json_text_put(t, "{");
    put_member(t, "prompt", r->prompt);
    put_member(t, "negative", r->negative);
    put_member(t, "model", r->model);
    put_member(t, "digest", r->digest);
    put_member(t, "licence", r->licence);
    put_member(t, "precision", r->precision);
    put_member(t, "software", r->software);
    if (r->campaign)
        put_member(t, "campaign", r->campaign);
    json_text_format(t, "\"width\":%d,\"height\":%d,\"steps\":%d,\"guidance\":", r->width, r->height, r->steps);
    json_text_double(t, r->guidance);
    json_text_format(t, ",\"seed\":%" PRIu64 ",\"truncated\":%s", r->seed, r->truncated ? "true" : "false");
    if (*or_empty(r->inputs)) {
        json_text_put(t, ",\"inputs\":");
        json_text_put(t, r->inputs);
    }
    json_text_put(t, "}");
}

/* --- EXIF: a TIFF of two folders, big-endian, because readers of UserComment expect its UTF-16 that way -------- */

static void put_u16(struct json_text *t, unsigned value)
{
    uint8_t raw[2] = {(uint8_t)(value >> 8), (uint8_t)value};
    json_text_add(t, raw, 2);
}

static void put_u32(struct json_text *t, uint32_t value)
{
    put_u16(t, value >> 16);
    put_u16(t, value & 0xffff);
}

/* The text was written as JSON before, so it is known to be UTF-8. */
static void put_utf16(struct json_text *t, const char *utf8)
{
    const uint8_t *p = (const uint8_t *)utf8;
    while (*p) {
        int more = *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : *p >= 0xc0 ? 1 : 0;
        uint32_t code = more == 3 ? *p & 7u : more == 2 ? *p & 15u : more == 1 ? *p & 31u : *p;
        p++;
        for (; more > 0 && (*p & 0xc0) == 0x80; more--)
            code = code << 6 | (*p++ & 63u);
        if (code >= 0x10000) {
            put_u16(t, 0xd800 + ((code - 0x10000) >> 10));
            put_u16(t, 0xdc00 + ((code - 0x10000) & 0x3ff));
        } else {
            put_u16(t, code);
        }
    }
}

/*   0 MM 002A 00000008 | 8 IFD0: 1 entry, 8769 LONG -> 26, next 0 | 26 Exif IFD: 1 entry, 9286 UNDEFINED n -> 44, next 0
 *  44 "UNICODE\0" and the text in UTF-16 */
static void put_exif(struct json_text *t, const char *parameters)
{
    struct json_text comment = {0};
    json_text_add(&comment, "UNICODE", 8);
    put_utf16(&comment, parameters);
    json_text_add(t, "MM", 2);
    put_u16(t, 42);
    put_u32(t, 8);
    put_u16(t, 1);
    put_u16(t, 0x8769), put_u16(t, 4), put_u32(t, 1), put_u32(t, 26);
    put_u32(t, 0);
    put_u16(t, 1);
    put_u16(t, 0x9286), put_u16(t, 7), put_u32(t, (uint32_t)comment.length), put_u32(t, 44);
    put_u32(t, 0);
    if (comment.failed)
        t->failed = true;
    else
        json_text_add(t, comment.data, comment.length);
    free(comment.data);
}

/* --- orientation: cameras store what the sensor saw and note in EXIF how it was held ------------------------------- */

struct tiff {
    const uint8_t *data;
    size_t bytes;
    bool is_big_endian;
};

static uint32_t tiff_number(const struct tiff *t, size_t at, size_t bytes)
{
    uint32_t value = 0;
    if (at > t->bytes || bytes > t->bytes - at)
        return 0;
    for (size_t i = 0; i < bytes; i++)
        value = value << 8 | t->data[at + (t->is_big_endian ? i : bytes - 1 - i)];
    return value;
}

/* The Orientation tag (0x0112, a SHORT) of the first folder: 1 to 8. Anything else - no tag, a damaged folder, a value
 * nobody defined - is 1, upright: pictures are not refused for what is written beside them. */
static int exif_orientation(const void *exif, size_t bytes)
{
    struct tiff t = {.data = exif, .bytes = bytes};
    if (bytes >= 6 && memcmp(exif, "Exif\0", 6) == 0)
        t.data += 6, t.bytes -= 6;
    if (t.bytes < 8 || (memcmp(t.data, "II*\0", 4) != 0 && memcmp(t.data, "MM\0*", 4) != 0))
        return 1;
    t.is_big_endian = *t.data == 'M';
    size_t folder = tiff_number(&t, 4, 4), count = tiff_number(&t, folder, 2);
    for (size_t i = 0; i < count && folder + 2 + 12 * i < t.bytes; i++) {
        size_t entry = folder + 2 + 12 * i;
        if (tiff_number(&t, entry, 2) != 0x0112)
            continue;
        uint32_t value = tiff_number(&t, entry + 2, 2) == 3 ? tiff_number(&t, entry + 8, 2) : 0;
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}

/* Where pixel (x, y) of the upright picture is in the stored one. Orientations from 5 on exchange the sides. */
static size_t stored_at(int orientation, int x, int y, int width, int height)
{
    bool is_turned = orientation >= 5;
    bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    int from_x = is_turned ? y : x, from_y = is_turned ? x : y;
    from_x = flip_x ? width - 1 - from_x : from_x;
    from_y = flip_y ? height - 1 - from_y : from_y;
    return (size_t)from_y * (size_t)width + (size_t)from_x;
}

/* --- PNG --------------------------------------------------------------------------------------------- */

static bool is_ascii(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s >= 0x7f || ((unsigned char)*s < 0x20 && *s != '\n'))
            return false;
    return true;
}

static struct spng_text png_text(const char *keyword, const char *value)
{
    struct spng_text text = {.length = strlen(value), .text = (char *)value};
    static char nothing[1] = "";
    snprintf(text.keyword, sizeof text.keyword, "%s", keyword);
    text.type = is_ascii(value) ? SPNG_TEXT : SPNG_ITXT;
    text.language_tag = nothing;
    text.translated_keyword = nothing;
    return text;
}

static bool encode_png(void **ret, size_t *ret_bytes, const uint8_t *rgb, const struct image_record *r,
                       const char *parameters, const char *record, char *why, size_t why_bytes)
{
    struct spng_ihdr header = {.width = (uint32_t)r->width, .height = (uint32_t)r->height, .bit_depth = 8,
                               .color_type = SPNG_COLOR_TYPE_TRUECOLOR};
    struct spng_text texts[3] = {png_text("parameters", parameters), png_text("kiln", record)};
    uint32_t text_count = 2;
    if (r->is_marked) {
        texts[text_count] = png_text("XML:com.adobe.xmp", XMP);
        texts[text_count++].type = SPNG_ITXT; /* readers of XMP look there only */
    }
    spng_ctx *png = spng_ctx_new(SPNG_CTX_ENCODER);
    int error = png ? 0 : SPNG_EMEM;
    if (!error)
        error = spng_set_option(png, SPNG_ENCODE_TO_BUFFER, 1);
    if (!error)
        error = spng_set_option(png, SPNG_IMG_COMPRESSION_LEVEL, 4);
    if (!error)
        error = spng_set_option(png, SPNG_FILTER_CHOICE, SPNG_FILTER_CHOICE_SUB | SPNG_FILTER_CHOICE_UP | SPNG_FILTER_CHOICE_PAETH);
    if (!error)
        error = spng_set_ihdr(png, &header);
    if (!error)
        error = spng_set_text(png, texts, text_count);
    if (!error)
        error = spng_encode_image(png, rgb, (size_t)r->width * (size_t)r->height * 3, SPNG_FMT_PNG, SPNG_ENCODE_FINALIZE);
    size_t bytes = 0;
    void *data = error ? NULL : spng_get_png_buffer(png, &bytes, &error);
    spng_ctx_free(png);
    if (!data)
        return refuse(why, why_bytes, "PNG encoder: %s", spng_strerror(error));
    *ret = data;
    *ret_bytes = bytes;
    return true;
}

static char *copy_text(const void *data, size_t bytes)
{
    char *copy = malloc(bytes + 1);
    if (copy) {
        memcpy(copy, data, bytes);
        copy[bytes] = 0;
    }
    return copy;
}

/* Texts behind the pixels count too; a file without any is no error, one with damaged texts is. */
static bool png_record(spng_ctx *png, char **ret, char *why, size_t why_bytes)
{
    uint32_t count = 0;
    int error = spng_decode_chunks(png);
    if (!error) {
        error = spng_get_text(png, NULL, &count);
        if (error == SPNG_ECHUNKAVAIL)
            return true;
    }
    struct spng_text *texts = error ? NULL : calloc(count ? count : 1, sizeof *texts);
    if (!error && !texts)
        error = SPNG_EMEM;
    if (!error)
        error = spng_get_text(png, texts, &count);
    for (uint32_t i = 0; !error && i < count && !*ret; i++)
        if (strcmp(texts[i].keyword, "kiln") == 0 && !(*ret = copy_text(texts[i].text, strlen(texts[i].text))))
            error = SPNG_EMEM;
    free(texts);
    return !error || refuse(why, why_bytes, "PNG: texts cannot be read: %s", spng_strerror(error));
}

static bool size_ok(int64_t width, int64_t height, char *why, size_t why_bytes)
{
    if (width >= 1 && height >= 1 && width <= IMAGE_FILE_SIDE_MAX && height <= IMAGE_FILE_SIDE_MAX &&
        width * height <= IMAGE_FILE_PIXELS_MAX)
        return true;
    return refuse(why, why_bytes, "image of %" PRId64 "x%" PRId64 ": accepted are 1 to %d a side and at most %u pixels", width,
                  height, IMAGE_FILE_SIDE_MAX, IMAGE_FILE_PIXELS_MAX);
}

/* What a decoder fills in; the caller takes or frees it. */
struct decoded {
    uint8_t *rgb;
    char *record;
    int width, height;
    int orientation; /* of EXIF; 0: not looked for yet, or none */
};

static bool set_upright(struct decoded *d, char *why, size_t why_bytes)
{
    if (d->orientation <= 1)
        return true;
    int width = d->orientation >= 5 ? d->height : d->width, height = d->orientation >= 5 ? d->width : d->height;
    uint8_t *upright = malloc((size_t)width * (size_t)height * 3);
    if (!upright)
        return refuse(why, why_bytes, "no memory to turn %dx%d pixels", d->width, d->height);
    uint8_t *to = upright;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++, to += 3)
            memcpy(to, d->rgb + 3 * stored_at(d->orientation, x, y, d->width, d->height), 3);
    free(d->rgb);
    d->rgb = upright;
    d->width = width;
    d->height = height;
    return true;
}

/* The chunk may stand behind the pixels. A file that ends there, or is damaged there, has none. */
static int png_orientation(spng_ctx *png)
{
    struct spng_exif exif;
    bool has_exif = spng_decode_chunks(png) == 0 && spng_get_exif(png, &exif) == 0;
    return has_exif ? exif_orientation(exif.data, exif.length) : 0;
}

static bool decode_png(struct decoded *d, bool want_record, const void *data, size_t bytes, char *why, size_t why_bytes)
{
    bool ok = false;
    struct spng_ihdr header;
    size_t length = 0;
    spng_ctx *png = spng_ctx_new(0);
    int error = png ? 0 : SPNG_EMEM;
    if (!error)
        error = spng_set_chunk_limits(png, PNG_CHUNK_MAX, 2 * PNG_CHUNK_MAX);
    if (!error)
        error = spng_set_png_buffer(png, data, bytes);
    if (!error)
        error = spng_get_ihdr(png, &header);
    if (error)
        goto damaged;
    if (!size_ok(header.width, header.height, why, why_bytes))
        goto done;
    error = spng_decoded_image_size(png, SPNG_FMT_RGB8, &length);
    if (!error && !(d->rgb = malloc(length)))
        error = SPNG_EMEM;
    if (!error)
        error = spng_decode_image(png, d->rgb, length, SPNG_FMT_RGB8, 0);
    if (error)
        goto damaged;
    d->width = (int)header.width;
    d->height = (int)header.height;
    ok = !want_record || png_record(png, &d->record, why, why_bytes);
    d->orientation = png_orientation(png);
    goto done;
damaged:
    refuse(why, why_bytes, "PNG: %s", spng_strerror(error));
done:
    spng_ctx_free(png);
    return ok;
}

/* --- JPEG -------------------------------------------------------------------------------------------- */

struct jpeg_trap {
    struct jpeg_error_mgr manager;
    jmp_buf back;
    char text[JMSG_LENGTH_MAX];
};

static void jpeg_fault(j_common_ptr jpeg)
{
    struct jpeg_trap *trap = (struct jpeg_trap *)jpeg->err;
    jpeg->err->format_message(jpeg, trap->text);
    longjmp(trap->back, 1);
}

static void jpeg_warning(j_common_ptr jpeg, int level)
{
    if (level < 0)
        jpeg_fault(jpeg);
}

static void jpeg_trap_set(struct jpeg_trap *trap, struct jpeg_error_mgr **ret)
{
    *ret = jpeg_std_error(&trap->manager);
    trap->manager.error_exit = jpeg_fault;
    trap->manager.emit_message = jpeg_warning;
    trap->text[0] = 0;
}

static void jpeg_scan_limit(j_common_ptr jpeg)
{
    struct jpeg_trap *trap = (struct jpeg_trap *)jpeg->err;
    if (((j_decompress_ptr)jpeg)->input_scan_number <= JPEG_SCANS_MAX)
        return;
    snprintf(trap->text, sizeof trap->text, "more than %d scans", JPEG_SCANS_MAX);
    longjmp(trap->back, 1);
}

/* kiln's record in pieces of one segment each, numbered from 1: "kiln\0" index count bytes. */
static void jpeg_write_record(struct jpeg_compress_struct *jpeg, const char *record, struct json_text *piece)
{
    const size_t tag = sizeof RECORD_TAG, room = JPEG_SEGMENT_MAX - tag - 2, length = strlen(record);
    const size_t count = (length + room - 1) / room;
    for (size_t i = 0; i < count; i++) {
        size_t bytes = i + 1 < count ? room : length - i * room;
        uint8_t number[2] = {(uint8_t)(i + 1), (uint8_t)count};
        piece->length = 0;
        json_text_add(piece, RECORD_TAG, tag);
        json_text_add(piece, number, 2);
        json_text_add(piece, record + i * room, bytes);
        if (!piece->failed)
            jpeg_write_marker(jpeg, RECORD_MARKER, (const JOCTET *)piece->data, (unsigned)piece->length);
    }
}

static void jpeg_write_texts(struct jpeg_compress_struct *jpeg, const struct image_record *r, const char *parameters,
                             const char *record, struct json_text *piece)
{
    piece->length = 0;
    json_text_add(piece, "Exif\0", 6);
    put_exif(piece, parameters);
    if (!piece->failed && piece->length <= JPEG_SEGMENT_MAX)
        jpeg_write_marker(jpeg, JPEG_APP0 + 1, (const JOCTET *)piece->data, (unsigned)piece->length);
    if (r->is_marked) {
        piece->length = 0;
        json_text_add(piece, XMP_TAG, sizeof XMP_TAG);
        json_text_put(piece, XMP);
        if (!piece->failed)
            jpeg_write_marker(jpeg, JPEG_APP0 + 1, (const JOCTET *)piece->data, (unsigned)piece->length);
    }
    jpeg_write_record(jpeg, record, piece);
}

static bool encode_jpg(void **ret, size_t *ret_bytes, const uint8_t *rgb, const struct image_record *r,
                       const char *parameters, const char *record, char *why, size_t why_bytes)
{
    struct jpeg_compress_struct jpeg = {0};
    struct jpeg_trap trap;
    struct json_text piece = {0};
    unsigned char *data = NULL;
    unsigned long bytes = 0;
    jpeg_trap_set(&trap, &jpeg.err);
    if (setjmp(trap.back)) {
        /* `data` may be a buffer the library has freed while growing: only a finished one is ours. Errors here are
         * lack of memory. */
        jpeg_destroy_compress(&jpeg);
        free(piece.data);
        return refuse(why, why_bytes, "JPEG encoder: %s", trap.text);
    }
    jpeg_create_compress(&jpeg);
    jpeg_mem_dest(&jpeg, &data, &bytes);
    jpeg.image_width = (JDIMENSION)r->width;
    jpeg.image_height = (JDIMENSION)r->height;
    jpeg.input_components = 3;
    jpeg.in_color_space = JCS_RGB;
    jpeg_set_defaults(&jpeg);
    jpeg_set_quality(&jpeg, 95, TRUE);
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.comp_info[0].h_samp_factor = jpeg.comp_info[0].v_samp_factor = 1; /* 4:4:4 */
    jpeg_start_compress(&jpeg, TRUE);
    jpeg_write_texts(&jpeg, r, parameters, record, &piece);
    while (jpeg.next_scanline < jpeg.image_height) {
        JSAMPROW row = (JSAMPROW)(rgb + (size_t)jpeg.next_scanline * (size_t)r->width * 3);
        jpeg_write_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_compress(&jpeg);
    jpeg_destroy_compress(&jpeg);
    bool ok = !piece.failed;
    free(piece.data);
    if (!ok) {
        free(data);
        return refuse(why, why_bytes, "JPEG encoder: no memory for the record");
    }
    *ret = data;
    *ret_bytes = bytes;
    return true;
}

/* Joins the pieces of the record; a missing or doubled piece means there is no record to trust. */
static char *jpeg_record(const struct jpeg_decompress_struct *jpeg)
{
    struct json_text record = {0};
    unsigned seen = 0, count = 0;
    for (jpeg_saved_marker_ptr m = jpeg->marker_list; m; m = m->next) {
        const size_t head = sizeof RECORD_TAG + 2;
        if (m->marker != RECORD_MARKER || m->data_length < head || memcmp(m->data, RECORD_TAG, sizeof RECORD_TAG) != 0)
            continue;
        if (m->data[head - 2] != ++seen)
            break;
        count = m->data[head - 1];
        json_text_add(&record, m->data + head, m->data_length - head);
    }
    if (seen && seen == count && !record.failed && !memchr(record.data, 0, record.length))
        return record.data;
    free(record.data);
    return NULL;
}

static int jpeg_orientation(const struct jpeg_decompress_struct *jpeg)
{
    for (jpeg_saved_marker_ptr m = jpeg->marker_list; m; m = m->next)
        if (m->marker == JPEG_APP0 + 1 && m->data_length >= 6 && memcmp(m->data, "Exif\0", 6) == 0)
            return exif_orientation(m->data, m->data_length);
    return 0;
}

/* Runs under decode_jpg's trap: what it takes is in `d`, where the trap leaves it to the caller. */
static bool jpeg_pixels(struct jpeg_decompress_struct *jpeg, struct decoded *d, bool want_record, char *why, size_t why_bytes)
{
    if (want_record)
        jpeg_save_markers(jpeg, RECORD_MARKER, 0xffff);
    jpeg_save_markers(jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(jpeg, TRUE);
    if (!size_ok(jpeg->image_width, jpeg->image_height, why, why_bytes))
        return false;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(jpeg);
    d->width = (int)jpeg->output_width;
    d->height = (int)jpeg->output_height;
    d->rgb = malloc((size_t)d->width * (size_t)d->height * 3);
    if (!d->rgb)
        return refuse(why, why_bytes, "JPEG: no memory for %dx%d pixels", d->width, d->height);
    while (jpeg->output_scanline < jpeg->output_height) {
        JSAMPROW row = d->rgb + (size_t)jpeg->output_scanline * (size_t)d->width * 3;
        jpeg_read_scanlines(jpeg, &row, 1);
    }
    if (want_record)
        d->record = jpeg_record(jpeg);
    d->orientation = jpeg_orientation(jpeg);
    jpeg_finish_decompress(jpeg);
    return true;
}

static bool decode_jpg(struct decoded *d, bool want_record, const void *data, size_t bytes, char *why, size_t why_bytes)
{
    struct jpeg_decompress_struct jpeg = {0};
    struct jpeg_progress_mgr progress = {.progress_monitor = jpeg_scan_limit};
    struct jpeg_trap trap;
    jpeg_trap_set(&trap, &jpeg.err);
    if (setjmp(trap.back)) {
        jpeg_destroy_decompress(&jpeg);
        return refuse(why, why_bytes, "JPEG: %s", trap.text);
    }
    jpeg_create_decompress(&jpeg);
    jpeg.progress = &progress;
    jpeg_mem_src(&jpeg, data, bytes);
    bool ok = jpeg_pixels(&jpeg, d, want_record, why, why_bytes);
    jpeg_destroy_decompress(&jpeg);
    return ok;
}

/* --- WebP -------------------------------------------------------------------------------------------- */

static bool webp_pixels(WebPMemoryWriter *writer, const uint8_t *rgb, const struct image_record *r, char *why, size_t why_bytes)
{
    WebPConfig config;
    WebPPicture picture;
    WebPMemoryWriterInit(writer);
    if (!WebPConfigInit(&config) || !WebPConfigLosslessPreset(&config, 1) || !WebPPictureInit(&picture))
        return refuse(why, why_bytes, "WebP encoder: the library has another version than its header");
    picture.use_argb = 1;
    picture.width = r->width;
    picture.height = r->height;
    picture.writer = WebPMemoryWrite;
    picture.custom_ptr = writer;
    bool ok = WebPPictureImportRGB(&picture, rgb, r->width * 3) && WebPEncode(&config, &picture);
    int error = picture.error_code;
    WebPPictureFree(&picture);
    return ok || refuse(why, why_bytes, "WebP encoder: error %d of libwebp", error);
}

static bool set_chunk(WebPMux *mux, const char *name, const char *data, size_t bytes)
{
    WebPData chunk = {(const uint8_t *)data, bytes};
    return WebPMuxSetChunk(mux, name, &chunk, 1) == WEBP_MUX_OK;
}

static bool encode_webp(void **ret, size_t *ret_bytes, const uint8_t *rgb, const struct image_record *r,
                        const char *parameters, const char *record, char *why, size_t why_bytes)
{
    if (r->width > WEBP_MAX_DIMENSION || r->height > WEBP_MAX_DIMENSION)
        return refuse(why, why_bytes, "WebP of %dx%d: the format ends at %d a side; use png or jpg", r->width, r->height,
                      WEBP_MAX_DIMENSION);
    bool ok = false;
    struct json_text exif = {0};
    WebPData file = {0};
    WebPMux *mux = NULL;
    WebPMemoryWriter writer;
    if (!webp_pixels(&writer, rgb, r, why, why_bytes))
        goto done;
    put_exif(&exif, parameters);
    mux = WebPMuxNew();
    WebPData image = {writer.mem, writer.size};
    ok = mux && !exif.failed && WebPMuxSetImage(mux, &image, 1) == WEBP_MUX_OK &&
         set_chunk(mux, "EXIF", exif.data, exif.length) &&
         (!r->is_marked || set_chunk(mux, "XMP ", XMP, strlen(XMP))) && set_chunk(mux, "KILN", record, strlen(record)) &&
         WebPMuxAssemble(mux, &file) == WEBP_MUX_OK;
    /* libwebp's memory is its own; the caller frees with free. */
    void *copy = ok ? malloc(file.size) : NULL;
    if (copy) {
        memcpy(copy, file.bytes, file.size);
        *ret = copy;
        *ret_bytes = file.size;
    } else {
        ok = refuse(why, why_bytes, "WebP encoder: no memory to put the record in");
    }
done:
    WebPDataClear(&file);
    WebPMuxDelete(mux);
    WebPMemoryWriterClear(&writer);
    free(exif.data);
    return ok;
}

static char *webp_record(const void *data, size_t bytes)
{
    WebPData file = {data, bytes}, chunk;
    char *record = NULL;
    WebPMux *mux = WebPMuxCreate(&file, 0);
    if (mux && WebPMuxGetChunk(mux, "KILN", &chunk) == WEBP_MUX_OK && chunk.size && !memchr(chunk.bytes, 0, chunk.size))
        record = copy_text(chunk.bytes, chunk.size);
    WebPMuxDelete(mux);
    return record;
}

static int webp_orientation(const void *data, size_t bytes)
{
    WebPData file = {data, bytes}, chunk;
    WebPMux *mux = WebPMuxCreate(&file, 0);
    bool has_exif = mux && WebPMuxGetChunk(mux, "EXIF", &chunk) == WEBP_MUX_OK;
    int orientation = has_exif ? exif_orientation(chunk.bytes, chunk.size) : 0;
    WebPMuxDelete(mux);
    return orientation;
}

static bool decode_webp(struct decoded *d, bool want_record, const void *data, size_t bytes, char *why, size_t why_bytes)
{
    WebPBitstreamFeatures features;
    if (WebPGetFeatures(data, bytes, &features) != VP8_STATUS_OK)
        return refuse(why, why_bytes, "WebP: the header is damaged");
    if (features.has_animation)
        return refuse(why, why_bytes, "WebP: an animation; accepted is a single image");
    if (!size_ok(features.width, features.height, why, why_bytes))
        return false;
    size_t stride = (size_t)features.width * 3, length = stride * (size_t)features.height;
    d->width = features.width;
    d->height = features.height;
    d->rgb = malloc(length);
    if (!d->rgb)
        return refuse(why, why_bytes, "WebP: no memory for %dx%d pixels", d->width, d->height);
    if (!WebPDecodeRGBInto(data, bytes, d->rgb, length, (int)stride))
        return refuse(why, why_bytes, "WebP: the pixels are damaged or cut off");
    if (want_record)
        d->record = webp_record(data, bytes);
    d->orientation = webp_orientation(data, bytes);
    return true;
}

/* --- both ways --------------------------------------------------------------------------------------- */

bool image_file_encode(void **ret, size_t *ret_bytes, enum image_format format, const uint8_t *rgb,
                       const struct image_record *record, char *why, size_t why_bytes)
{
    struct json_text parameters = {0}, json = {0};
    bool ok = false;
    put_record(&json, record);
    put_parameters(&parameters, record);
    if (!size_ok(record->width, record->height, why, why_bytes))
        ok = false;
    else if (json.failed || parameters.failed)
        refuse(why, why_bytes, "the image's record cannot be written: a text is not UTF-8, or no memory");
    else if (format == IMAGE_PNG)
        ok = encode_png(ret, ret_bytes, rgb, record, parameters.data, json.data, why, why_bytes);
    else if (format == IMAGE_JPG)
        ok = encode_jpg(ret, ret_bytes, rgb, record, parameters.data, json.data, why, why_bytes);
    else
        ok = encode_webp(ret, ret_bytes, rgb, record, parameters.data, json.data, why, why_bytes);
    free(parameters.data);
    free(json.data);
    return ok;
}

bool image_file_decode(uint8_t **ret_rgb, int *ret_width, int *ret_height, char **ret_record_json, const void *data,
                       size_t bytes, char *why, size_t why_bytes)
{
    const uint8_t *b = data;
    struct decoded d = {0};
    bool ok, want_record = ret_record_json != NULL;
    if (bytes >= 8 && memcmp(b, "\x89PNG\r\n\x1a\n", 8) == 0)
        ok = decode_png(&d, want_record, data, bytes, why, why_bytes);
    else if (bytes >= 3 && memcmp(b, "\xff\xd8\xff", 3) == 0)
        ok = decode_jpg(&d, want_record, data, bytes, why, why_bytes);
    else if (bytes >= 12 && memcmp(b, "RIFF", 4) == 0 && memcmp(b + 8, "WEBP", 4) == 0)
        ok = decode_webp(&d, want_record, data, bytes, why, why_bytes);
    else
        ok = refuse(why, why_bytes, "neither PNG, JPEG nor WebP: the first bytes are those of none of them");
    ok = ok && set_upright(&d, why, why_bytes);
    if (!ok) {
        free(d.rgb);
        free(d.record);
        return false;
    }
    *ret_rgb = d.rgb;
    *ret_width = d.width;
    *ret_height = d.height;
    if (want_record)
        *ret_record_json = d.record;
    return true;
}
