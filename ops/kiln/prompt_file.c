/* prompt_file.c - the reader behind prompt_file.h.
 *
 * One buffer holds the row that is being read; a row is found, checked (NUL, UTF-8), cut into fields in place, and
 * forgotten. A quoted field may go on over several lines, so the csv scanner keeps its state while the
 * buffer grows: no byte is looked at twice, whatever a hostile file does with quotes. All formats end in the same
 * column setters, so that a rule about a value stands in one place. */
#include "prompt_file.h"

#include "digest.h"
#include "json_text.h"
#include "tally.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define CHUNK (256u << 10)
#define COLUMN_NAME_MAX 256
#define MODEL_MAX 128
#define LABELS_NOTED 32

enum column {
    COLUMN_PROMPT,
    COLUMN_NEGATIVE,
    COLUMN_SEED,
    COLUMN_SIZE,
    COLUMN_WIDTH,
    COLUMN_HEIGHT,
    COLUMN_STEPS,
    COLUMN_GUIDANCE,
    COLUMN_MODEL,
    COLUMN_IMAGE,
    COLUMN_MASK,
    COLUMN_STRENGTH,
    COLUMN_LORA,
    COLUMN_NAME,
    COLUMN_LABEL,
};
static const char *const column_names[COLUMN_LABEL] = {"prompt", "negative", "seed", "size", "width", "height", "steps",
                                                       "guidance", "model", "image", "mask", "strength",
                                                       "lora", "name"};

struct span { /* a field within the row, from its first byte */
    size_t at, length;
    bool is_quoted, has_pairs; /* pairs: "" inside, to be halved */
};

struct prompt_file {
    char *title;
    enum prompt_format format;
    int fd;                    /* or -1: from memory */
    const char *memory;
    size_t memory_left;

    char *buffer;              /* [begin, end) is read and not yet used; one byte behind it is always ours */
    size_t begin, end, room;
    bool is_all;               /* nothing comes behind `end` */
    bool is_over;              /* the end was reported, or that nothing more can be read */
    int64_t line;              /* of buffer[begin] */

    char **labels;             /* csv, tsv: the header; NULL where the column is a known one */
    enum column *columns;
    int column_count;
    struct span *spans;

    struct tally names;
    struct json_text label_text;
    json_t *object;            /* jsonl: the row's strings live here */
    char numbers[COLUMN_LABEL][32];
};

__attribute__((format(printf, 3, 4))) static bool refuse(char *why, size_t why_bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(why, why_bytes, format, args);
    va_end(args);
    return false;
}

/* Puts "FILE:LINE: " before a sentence. */
__attribute__((format(printf, 5, 6))) static bool refuse_at(const struct prompt_file *f, int64_t line, char *why,
                                                            size_t why_bytes, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return refuse(why, why_bytes, "%s:%" PRId64 ": %s", f->title, line, text);
}

/* --- rules of values --------------------------------------------------------------------------------- */

bool prompt_file_size_ok(int64_t width, int64_t height, char *why, size_t why_bytes)
{
    const int64_t side_max = PROMPT_FILE_PIXELS_MAX / PROMPT_FILE_SIDE_MIN;
    const int64_t sides[2] = {width, height};
    for (int i = 0; i < 2; i++)
        if (sides[i] % 16 || sides[i] < PROMPT_FILE_SIDE_MIN || sides[i] > side_max)
            return refuse(why, why_bytes, "%s %" PRId64 ": accepted are multiples of 16 from %d", i ? "height" : "width",
                          sides[i], PROMPT_FILE_SIDE_MIN);
    if (width * height > PROMPT_FILE_PIXELS_MAX)
        return refuse(why, why_bytes, "size %" PRId64 "x%" PRId64 " is %" PRId64 " pixels: accepted are at most %d", width,
                      height, width * height, PROMPT_FILE_PIXELS_MAX);
    return true;
}

/* What a message may show of a value: short, on one line. */
static const char *shown(const char *text, char ret[48])
{
    size_t i = 0;
    for (; text[i] && i < 40; i++)
        ret[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
    while (i > 0 && text[i] && ((unsigned char)text[i] & 0xc0) == 0x80)
        i--; /* not in the middle of a character */
    strcpy(ret + i, text[i] ? "..." : "");
    return ret;
}

/* A number with nothing but blanks around it: what is between, or false. */
static bool trimmed(const char *text, char *ret, size_t bytes)
{
    size_t length = strlen(text);
    while (length && (text[length - 1] == ' ' || text[length - 1] == '\t'))
        length--;
    while (length && (*text == ' ' || *text == '\t'))
        text++, length--;
    if (length == 0 || length >= bytes)
        return false;
    memcpy(ret, text, length);
    ret[length] = 0;
    return true;
}

static bool read_whole(const char *text, uint64_t most, uint64_t *ret)
{
    char digits[24];
    uint64_t value = 0;
    if (!trimmed(text, digits, sizeof digits))
        return false;
    for (const char *p = digits; *p; p++)
        if (!isdigit((unsigned char)*p) || __builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*p - '0'), &value))
            return false;
    *ret = value;
    return value <= most;
}

bool prompt_file_read_seed(const char *text, uint64_t *ret, char *why, size_t why_bytes)
{
    char part[48];
    return read_whole(text, UINT64_MAX, ret) ||
           refuse(why, why_bytes, "seed '%s': accepted is a whole number from 0 to %" PRIu64, shown(text, part), UINT64_MAX);
}

bool prompt_file_read_steps(const char *text, int *ret, char *why, size_t why_bytes)
{
    char part[48];
    uint64_t value;
    if (!read_whole(text, PROMPT_FILE_STEPS_MAX, &value) || value < 1)
        return refuse(why, why_bytes, "steps '%s': accepted is a whole number from 1 to %d", shown(text, part),
                      PROMPT_FILE_STEPS_MAX);
    *ret = (int)value;
    return true;
}

bool prompt_file_read_guidance(const char *text, double *ret, char *why, size_t why_bytes)
{
    char digits[40], part[48], *end = NULL;
    double value = NAN;
    if (trimmed(text, digits, sizeof digits) && strspn(digits, "0123456789.eE+-") == strlen(digits))
        value = strtod(digits, &end);
    if (!end || *end || !(value >= 0 && value <= PROMPT_FILE_GUIDANCE_MAX))
        return refuse(why, why_bytes, "guidance '%s': accepted is a number from 0 to %d", shown(text, part),
                      PROMPT_FILE_GUIDANCE_MAX);
    *ret = value;
    return true;
}

bool prompt_file_read_size(const char *text, int *ret_width, int *ret_height, char *why, size_t why_bytes)
{
    int width = 0, height = 0, used = 0;
    char part[48];
    bool digits = strspn(text, "0123456789xX") == strlen(text) && strlen(text) < 16;
    if (!digits || sscanf(text, "%6d%*1[xX]%6d%n", &width, &height, &used) != 2 || text[used])
        return refuse(why, why_bytes, "size '%s': accepted is WIDTHxHEIGHT, as 512x768", shown(text, part));
    if (!prompt_file_size_ok(width, height, why, why_bytes))
        return false;
    *ret_width = width;
    *ret_height = height;
    return true;
}

static bool read_side(const char *text, const char *what, int *ret, char *why, size_t why_bytes)
{
    char part[48];
    uint64_t value;
    if (!read_whole(text, INT32_MAX, &value) || value == 0)
        return refuse(why, why_bytes, "%s '%s': accepted are multiples of 16 from %d", what, shown(text, part),
                      PROMPT_FILE_SIDE_MIN);
    *ret = (int)value;
    return true;
}

/* The text without blanks around it, cut in place. */
static char *without_blanks(char *text)
{
    text += strspn(text, " \t");
    for (size_t length = strlen(text); length && strchr(" \t\r\n", text[length - 1]); length--)
        text[length - 1] = 0;
    return text;
}

static bool is_blank(const char *text)
{
    return text[strspn(text, " \t\r\n")] == 0;
}

static bool name_ok(const char *name, char *why, size_t why_bytes)
{
    char part[48];
    size_t length = strlen(name);
    if (*name == '.' || length > PROMPT_FILE_NAME_MAX ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != length)
        return refuse(why, why_bytes, "name '%s': accepted are 1 to %d of A-Z a-z 0-9 . _ - and no '.' in front",
                      shown(name, part), PROMPT_FILE_NAME_MAX);
    return true;
}

static bool model_ok(const char *model, char *why, size_t why_bytes)
{
    char part[48];
    for (const char *p = model; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return refuse(why, why_bytes, "model '%s': control characters are not accepted", shown(model, part));
    return strlen(model) <= MODEL_MAX ||
           refuse(why, why_bytes, "model '%s': %zu bytes, accepted are at most %d", shown(model, part), strlen(model), MODEL_MAX);
}

/* --- columns ----------------------------------------------------------------------------------------- */

static enum column column_of(const char *name)
{
    for (int i = 0; i < COLUMN_LABEL; i++)
        if (strcasecmp(name, column_names[i]) == 0)
            return (enum column)i;
    return COLUMN_LABEL;
}

/* One more file of a column that takes several. */
static bool add_input(struct prompt_inputs *in, enum column column, const char *text, char *why, size_t why_bytes)
{
    const bool is_image = column == COLUMN_IMAGE;
    const int most = is_image ? TASK_INPUTS_IMAGES_MAX : TASK_INPUTS_LORAS_MAX;
    int *count = is_image ? &in->image_count : &in->lora_count;
    size_t length;
    double scale;
    if (is_blank(text))
        return refuse(why, why_bytes, "'%s' names a file without a name; accepted is a file, or several with ';' between them",
                      column_names[column]);
    if (*count == most)
        return refuse(why, why_bytes, "'%s' names more than %d files", column_names[column], most);
    if (!is_image && !task_inputs_read_lora(text, &length, &scale, why, why_bytes))
        return false;
    (is_image ? in->images : in->loras)[(*count)++] = text;
    return true;
}

/* Cuts "a.png; b.png" in place. */
static bool add_inputs(struct prompt_inputs *in, enum column column, char *text, char *why, size_t why_bytes)
{
    bool ok = true;
    for (char *part = text, *next; ok && part; part = next) {
        next = strchr(part, ';');
        if (next)
            *next++ = 0;
        ok = add_input(in, column, without_blanks(part), why, why_bytes);
    }
    return ok;
}

/* Either says how large a picture is; which one was meant is not guessed. */
static bool sides_ok(const struct prompt_row *row, enum column column, char *why, size_t why_bytes)
{
    bool is_clash = column == COLUMN_SIZE ? row->width || row->height : (column == COLUMN_WIDTH || column == COLUMN_HEIGHT) && row->has_size;
    return !is_clash || refuse(why, why_bytes, "'size' beside 'width' or 'height'; accepted is one or the other");
}

/* Sets one known column. Empty cells of csv and nulls of JSON never come here: they are "not given". */
static bool set_column(struct prompt_row *row, enum column column, char *text, char *why, size_t why_bytes)
{
    if (!sides_ok(row, column, why, why_bytes))
        return false;
    switch (column) {
    case COLUMN_PROMPT:
        row->prompt = text;
        return true;
    case COLUMN_NEGATIVE:
        row->negative = text;
        return strlen(text) <= PROMPT_FILE_PROMPT_MAX || refuse(why, why_bytes, "negative prompt of %zu bytes: accepted are at most %d",
                                                                strlen(text), PROMPT_FILE_PROMPT_MAX);
    case COLUMN_SEED:
        row->has_seed = true;
        return prompt_file_read_seed(text, &row->seed, why, why_bytes);
    case COLUMN_SIZE:
        row->has_size = true;
        return prompt_file_read_size(without_blanks(text), &row->width, &row->height, why, why_bytes);
    case COLUMN_WIDTH: return read_side(text, "width", &row->width, why, why_bytes);
    case COLUMN_HEIGHT: return read_side(text, "height", &row->height, why, why_bytes);
    case COLUMN_STEPS: return prompt_file_read_steps(text, &row->steps, why, why_bytes);
    case COLUMN_GUIDANCE: return prompt_file_read_guidance(text, &row->guidance, why, why_bytes);
    case COLUMN_MODEL:
        row->model = text;
        return model_ok(text, why, why_bytes);
    case COLUMN_NAME:
        row->name = text;
        return name_ok(text, why, why_bytes);
    case COLUMN_MASK:
        text = without_blanks(text);
        row->inputs.mask = *text ? text : NULL;
        return true;
    case COLUMN_STRENGTH: return task_inputs_read_strength(without_blanks(text), &row->inputs.strength, why, why_bytes);
    default: return add_inputs(&row->inputs, column, text, why, why_bytes);
    }
}

static struct prompt_row empty_row(int64_t line)
{
    return (struct prompt_row){.line = line, .guidance = NAN};
}

/* What only the whole row can answer: a prompt there, the sides' rules, the name's first use. */
static bool row_ok(struct prompt_file *f, const struct prompt_row *row, char *why, size_t why_bytes)
{
    char text[512];
    if (!row->prompt || is_blank(row->prompt))
        return refuse_at(f, row->line, why, why_bytes, "the prompt is empty; every row needs one");
    if (strlen(row->prompt) > PROMPT_FILE_PROMPT_MAX)
        return refuse_at(f, row->line, why, why_bytes, "prompt of %zu bytes: accepted are at most %d", strlen(row->prompt),
                         PROMPT_FILE_PROMPT_MAX);
    /* A side alone is tried beside the smallest: which other one it gets is the caller's default. */
    if ((row->width || row->height) &&
        !prompt_file_size_ok(row->width ? row->width : PROMPT_FILE_SIDE_MIN, row->height ? row->height : PROMPT_FILE_SIDE_MIN,
                             text, sizeof text))
        return refuse_at(f, row->line, why, why_bytes, "%s", text);
    if (row->name) {
        uint8_t key[32];
        digest_bytes(row->name, strlen(row->name), key);
        struct tally_slot *slot = tally_add(&f->names, key);
        if (!slot)
            return refuse_at(f, row->line, why, why_bytes, "no memory for the names");
        if (slot->count > 1)
            return refuse_at(f, row->line, why, why_bytes, "name '%s' stands in line %" PRIu32 " already; names are unique in a file",
                             row->name, slot->mark);
        slot->mark = (uint32_t)row->line;
    }
    return true;
}

/* --- the buffer -------------------------------------------------------------------------------------- */

static ssize_t read_source(struct prompt_file *f, char *data, size_t bytes)
{
    if (f->fd < 0) {
        size_t part = f->memory_left < bytes ? f->memory_left : bytes;
        if (part)
            memcpy(data, f->memory, part);
        f->memory += part;
        f->memory_left -= part;
        return (ssize_t)part;
    }
    ssize_t got;
    do
        got = read(f->fd, data, bytes);
    while (got < 0 && errno == EINTR);
    return got;
}

/* Reads on: afterwards there are more bytes, or is_all is set. Offsets from `begin` stay good, pointers do not. */
static bool fill(struct prompt_file *f, char *why, size_t why_bytes)
{
    if (f->begin > 0) {
        memmove(f->buffer, f->buffer + f->begin, f->end - f->begin);
        f->end -= f->begin;
        f->begin = 0;
    }
    if (f->room - f->end < CHUNK + 1) {
        size_t room = f->end + 2 * CHUNK;
        char *grown = realloc(f->buffer, room);
        if (!grown)
            return refuse_at(f, f->line, why, why_bytes, "no memory for %zu bytes", room);
        f->buffer = grown;
        f->room = room;
    }
    ssize_t got = read_source(f, f->buffer + f->end, CHUNK);
    if (got < 0)
        return refuse(why, why_bytes, "%s: cannot be read: %s", f->title, strerror(errno));
    f->is_all = got == 0;
    f->end += (size_t)got;
    return true;
}

/* NUL and UTF-8, of the `length` bytes at begin; names line and byte. */
static bool text_ok(const struct prompt_file *f, size_t length, char *why, size_t why_bytes)
{
    const char *data = f->buffer + f->begin, *nul = memchr(data, 0, length);
    size_t fault = json_text_utf8_fault(data, length);
    if (nul && (size_t)(nul - data) < fault)
        fault = (size_t)(nul - data);
    if (fault == length)
        return true;
    int64_t line = f->line;
    size_t line_start = 0;
    for (size_t i = 0; i < fault; i++)
        if (data[i] == '\n') {
            line++;
            line_start = i + 1;
        }
    if (data[fault] == 0)
        return refuse_at(f, line, why, why_bytes, "byte %zu is NUL; accepted is text", fault - line_start + 1);
    return refuse_at(f, line, why, why_bytes, "byte %zu is 0x%02x, which is not valid UTF-8; save the file as UTF-8",
                     fault - line_start + 1, (unsigned char)data[fault]);
}

static bool too_long(const struct prompt_file *f, char *why, size_t why_bytes)
{
    return refuse_at(f, f->line, why, why_bytes, "the line is longer than %u bytes", PROMPT_FILE_LINE_MAX);
}

/* Gives the next line at `begin`: its length without the line end, and with it. PROMPT_END when none is left. */
static enum prompt_next find_line(struct prompt_file *f, size_t *ret_length, size_t *ret_whole, char *why, size_t why_bytes)
{
    size_t seen = 0;
    for (;;) {
        size_t left = f->end - f->begin;
        char *newline = left > seen ? memchr(f->buffer + f->begin + seen, '\n', left - seen) : NULL;
        size_t length = newline ? (size_t)(newline - f->buffer) - f->begin : left;
        if (length > PROMPT_FILE_LINE_MAX)
            return too_long(f, why, why_bytes), PROMPT_BAD;
        if (newline || f->is_all) {
            if (!newline && left == 0)
                return PROMPT_END;
            *ret_whole = length + (newline ? 1 : 0);
            if (length && f->buffer[f->begin + length - 1] == '\r')
                length--;
            *ret_length = length;
            return PROMPT_ROW;
        }
        seen = left;
        if (!fill(f, why, why_bytes))
            return PROMPT_BAD;
    }
}

/* --- txt --------------------------------------------------------------------------------------------- */

static enum prompt_next next_txt(struct prompt_file *f, struct prompt_row *row, char *why, size_t why_bytes)
{
    for (;;) {
        size_t length, whole;
        enum prompt_next found = find_line(f, &length, &whole, why, why_bytes);
        if (found != PROMPT_ROW)
            return found;
        if (!text_ok(f, length, why, why_bytes))
            return PROMPT_BAD;
        char *text = f->buffer + f->begin;
        *row = empty_row(f->line);
        f->begin += whole;
        f->line++;
        while (length && (text[length - 1] == ' ' || text[length - 1] == '\t' || text[length - 1] == '\r'))
            length--;
        text[length] = 0;
        text += strspn(text, " \t");
        if (!*text || *text == '#')
            continue;
        row->prompt = text;
        return row_ok(f, row, why, why_bytes) ? PROMPT_ROW : PROMPT_WRONG;
    }
}

/* --- csv and tsv ------------------------------------------------------------------------------------- */

enum scan_state { FIELD_START, PLAIN, QUOTED, AFTER_QUOTE };

struct scan {
    enum scan_state state;
    size_t at;                 /* next byte, from begin */
    int count;                 /* fields found */
    int64_t line, quote_line;  /* of `at`; where the open quote stands */
};

static bool end_field(struct prompt_file *f, struct scan *s, size_t end, char *why, size_t why_bytes)
{
    struct span *span = &f->spans[s->count];
    span->length = end - span->at;
    if (++s->count >= PROMPT_FILE_COLUMNS_MAX)
        return refuse_at(f, s->line, why, why_bytes, "more than %d columns", PROMPT_FILE_COLUMNS_MAX - 1);
    f->spans[s->count] = (struct span){.at = s->at + 1};
    s->state = FIELD_START;
    return true;
}

/* A byte behind a closing quote that ends neither field nor row. */
static bool behind_quote(struct prompt_file *f, struct scan *s, char *why, size_t why_bytes)
{
    struct span *span = &f->spans[s->count];
    if (f->format == PROMPT_TSV && s->line == s->quote_line) {
        *span = (struct span){.at = span->at - 1}; /* it was never a quoted field: take it as it is written */
        s->state = PLAIN;
        return true;
    }
    return refuse_at(f, s->quote_line, why, why_bytes,
                     "unbalanced quotes: the quote that begins here is closed and text follows; inside quotes write \"\" for \"");
}

/* One byte of a row. A span begins behind its opening quote; its length is set when it ends. */
static bool scan_byte(struct prompt_file *f, struct scan *s, char c, char *why, size_t why_bytes)
{
    const char comma = f->format == PROMPT_TSV ? '\t' : ',';
    struct span *span = &f->spans[s->count];
    switch (s->state) {
    case FIELD_START:
        if (c == '"') {
            *span = (struct span){.at = s->at + 1, .is_quoted = true};
            s->quote_line = s->line;
            s->state = QUOTED;
            return true;
        }
        s->state = PLAIN; /* fall through */
    case PLAIN:
        if (c == comma)
            return end_field(f, s, s->at, why, why_bytes);
        if (c == '"' && f->format == PROMPT_CSV)
            return refuse_at(f, s->line, why, why_bytes,
                             "unbalanced quotes: a quote inside a field that does not begin with one; write \"...\"\"...\"");
        return true;
    case QUOTED:
        if (c == '"') {
            span->length = s->at - span->at;
            s->state = AFTER_QUOTE;
        }
        return true;
    default: /* AFTER_QUOTE */
        if (c == '"') {
            span->has_pairs = true;
            s->state = QUOTED;
            return true;
        }
        if (c == comma)
            return end_field(f, s, span->at + span->length, why, why_bytes);
        return c == '\r' || behind_quote(f, s, why, why_bytes);
    }
}

/* A '\r' behind a closing quote was let pass as half of a line end; something else came. */
static bool stray_return(const struct prompt_file *f, const struct scan *s)
{
    return s->state == AFTER_QUOTE && s->at > 0 && f->buffer[f->begin + s->at - 1] == '\r';
}

static void end_row(struct prompt_file *f, struct scan *s)
{
    struct span *span = &f->spans[s->count];
    if (s->state == FIELD_START)
        span->at = s->at, span->length = 0;
    if (s->state == PLAIN) {
        span->length = s->at - span->at;
        if (span->length && f->buffer[f->begin + s->at - 1] == '\r')
            span->length--;
    }
    s->count++;
}

/* Finds the fields of the next row: ret_count of them, ret_whole bytes and ret_lines lines. */
static enum prompt_next find_fields(struct prompt_file *f, int *ret_count, size_t *ret_whole, int64_t *ret_lines, char *why,
                                    size_t why_bytes)
{
    struct scan s = {.line = f->line};
    f->spans[0] = (struct span){0};
    for (;; s.at++) {
        if (f->begin + s.at == f->end && !f->is_all && !fill(f, why, why_bytes))
            return PROMPT_BAD;
        bool is_end = f->begin + s.at == f->end;
        if (s.at > PROMPT_FILE_LINE_MAX)
            return too_long(f, why, why_bytes), PROMPT_BAD;
        if (is_end && s.at == 0)
            return PROMPT_END;
        if (is_end && s.state == QUOTED)
            return refuse_at(f, s.quote_line, why, why_bytes, "unbalanced quotes: the quote that begins here is never closed"),
                   PROMPT_BAD;
        char c = is_end ? '\n' : f->buffer[f->begin + s.at];
        if (c == '\n' && s.state != QUOTED) {
            end_row(f, &s);
            *ret_count = s.count;
            *ret_whole = s.at + (is_end ? 0 : 1);
            *ret_lines = s.line - f->line + 1;
            return PROMPT_ROW;
        }
        if (stray_return(f, &s) && !behind_quote(f, &s, why, why_bytes))
            return PROMPT_BAD;
        if (!scan_byte(f, &s, c, why, why_bytes))
            return PROMPT_BAD;
        if (c == '\n')
            s.line++;
    }
}

/* Cuts field i out in place: the byte behind it (a comma, a quote, the line's end) becomes NUL. */
static char *field_text(struct prompt_file *f, size_t base, int i)
{
    struct span *span = &f->spans[i];
    char *text = f->buffer + base + span->at;
    size_t length = span->length;
    if (span->has_pairs) {
        size_t out = 0;
        for (size_t in = 0; in < length; in++) {
            text[out++] = text[in];
            if (text[in] == '"')
                in++; /* the second of the pair */
        }
        length = out;
    }
    text[length] = 0;
    return text;
}

/* The next row that is not an empty line, cut off the buffer and checked as text. */
static enum prompt_next take_fields(struct prompt_file *f, size_t *ret_base, int *ret_count, int64_t *ret_line, char *why,
                                    size_t why_bytes)
{
    for (;;) {
        size_t whole;
        int64_t lines;
        enum prompt_next found = find_fields(f, ret_count, &whole, &lines, why, why_bytes);
        if (found != PROMPT_ROW)
            return found;
        if (!text_ok(f, whole, why, why_bytes))
            return PROMPT_BAD;
        *ret_base = f->begin;
        *ret_line = f->line;
        f->begin += whole;
        f->line += lines;
        if (*ret_count > 1 || f->spans[0].length > 0 || f->spans[0].is_quoted)
            return PROMPT_ROW;
    }
}

static bool label_cell(struct prompt_file *f, const char *name, const char *text)
{
    json_text_put(&f->label_text, f->label_text.length ? "," : "{");
    json_text_text(&f->label_text, name);
    json_text_put(&f->label_text, ":");
    json_text_text(&f->label_text, text);
    return !f->label_text.failed;
}

static enum prompt_next next_table(struct prompt_file *f, struct prompt_row *row, char *why, size_t why_bytes)
{
    size_t base;
    int count;
    int64_t line;
    char text[512];
    enum prompt_next found = take_fields(f, &base, &count, &line, why, why_bytes);
    if (found != PROMPT_ROW)
        return found;
    const char *separator = f->format == PROMPT_TSV ? "tab" : "comma";
    if (count > f->column_count)
        return refuse_at(f, line, why, why_bytes, "the row has %d fields, the header has %d; quote fields that hold a %s", count,
                         f->column_count, separator),
               PROMPT_WRONG;
    if (count < f->column_count)
        return refuse_at(f, line, why, why_bytes, "the row has %d field%s, the header has %d; every column needs a field, an empty one at "
                         "least, with its %s", count, count == 1 ? "" : "s", f->column_count, separator),
               PROMPT_WRONG;
    *row = empty_row(line);
    json_text_clear(&f->label_text);
    for (int i = 0; i < count; i++) {
        char *cell = field_text(f, base, i);
        if (!*cell)
            continue;
        if (f->columns[i] == COLUMN_LABEL && !label_cell(f, f->labels[i], cell))
            return refuse_at(f, line, why, why_bytes, "no memory for the labels"), PROMPT_BAD;
        if (f->columns[i] != COLUMN_LABEL && !set_column(row, f->columns[i], cell, text, sizeof text))
            return refuse_at(f, line, why, why_bytes, "%s", text), PROMPT_WRONG;
    }
    if (f->label_text.length) {
        json_text_put(&f->label_text, "}");
        row->labels_json = f->label_text.data;
    }
    return row_ok(f, row, why, why_bytes) ? PROMPT_ROW : PROMPT_WRONG;
}

static bool add_column(struct prompt_file *f, int64_t line, char *name, char *why, size_t why_bytes)
{
    char part[48];
    int n = f->column_count;
    if (!*name)
        return refuse_at(f, line, why, why_bytes, "column %d has no name; the first line must name the columns", n + 1);
    if (strlen(name) > COLUMN_NAME_MAX)
        return refuse_at(f, line, why, why_bytes, "column name '%s' is longer than %d bytes", shown(name, part), COLUMN_NAME_MAX);
    for (int i = 0; i < n; i++)
        if (strcasecmp(f->labels[i], name) == 0)
            return refuse_at(f, line, why, why_bytes, "columns %d and %d are both named '%s'; accepted is each name once", i + 1,
                             n + 1, shown(name, part));
    f->columns[n] = column_of(name);
    f->labels[n] = strdup(name);
    f->column_count = n + 1;
    return f->labels[n] || refuse_at(f, line, why, why_bytes, "no memory for the header");
}

static bool read_header(struct prompt_file *f, char *why, size_t why_bytes)
{
    size_t base;
    int count;
    int64_t line;
    bool has_prompt = false;
    f->labels = calloc(PROMPT_FILE_COLUMNS_MAX, sizeof *f->labels);
    f->columns = calloc(PROMPT_FILE_COLUMNS_MAX, sizeof *f->columns);
    f->spans = calloc(PROMPT_FILE_COLUMNS_MAX, sizeof *f->spans);
    if (!f->labels || !f->columns || !f->spans)
        return refuse_at(f, 1, why, why_bytes, "no memory for the header");
    enum prompt_next found = take_fields(f, &base, &count, &line, why, why_bytes);
    if (found != PROMPT_ROW)
        return found == PROMPT_END; /* an empty file has no rows */
    for (int i = 0; i < count; i++) {
        if (!add_column(f, line, without_blanks(field_text(f, base, i)), why, why_bytes))
            return false;
        has_prompt = has_prompt || f->columns[i] == COLUMN_PROMPT;
    }
    char part[48];
    return has_prompt || refuse_at(f, line, why, why_bytes,
                                   "no column is named 'prompt' (the first is '%s'); the first line must name the columns",
                                   shown(f->labels[0], part));
}

/* --- jsonl ------------------------------------------------------------------------------------------- */

/* jansson's integers end at 2^63 - 1, seeds at 2^64 - 1: writes whole numbers of 19 digits and more as strings. */
static void quote_big_numbers(struct json_text *out, const char *text, size_t length)
{
    bool in_string = false;
    for (size_t i = 0; i < length; i++) {
        size_t digits = 0;
        if (in_string && text[i] == '\\' && i + 1 < length) {
            json_text_add(out, text + i++, 1);
        } else if (text[i] == '"') {
            in_string = !in_string;
        } else if (!in_string && isdigit((unsigned char)text[i])) {
            while (i + digits < length && isdigit((unsigned char)text[i + digits]))
                digits++;
            bool is_whole = (i == 0 || !strchr("+-.eE", text[i - 1])) && (i + digits == length || !strchr(".eE", text[i + digits]));
            if (digits >= 19 && is_whole)
                json_text_string(out, text + i, digits);
            else
                json_text_add(out, text + i, digits);
            i += digits - 1;
            continue;
        }
        json_text_add(out, text + i, 1);
    }
}

static json_t *parse_object(struct prompt_file *f, const char *text, size_t length, json_error_t *error)
{
    json_t *value = json_loadb(text, length, JSON_REJECT_DUPLICATES, error);
    if (!value && json_error_code(error) == json_error_numeric_overflow) {
        json_text_clear(&f->label_text);
        quote_big_numbers(&f->label_text, text, length);
        if (!f->label_text.failed)
            value = json_loadb(f->label_text.data, f->label_text.length, JSON_REJECT_DUPLICATES, error);
    }
    return value;
}

/* "a.png", or ["a.png", "b.png"]: each string is one name, whatever is in it. */
static bool set_files(struct prompt_row *row, enum column column, const json_t *value, char *why, size_t why_bytes)
{
    bool ok = true;
    if (json_is_string(value) && json_string_length(value) > 0)
        return add_input(&row->inputs, column, json_string_value(value), why, why_bytes);
    for (size_t i = 0; ok && i < json_array_size(value); i++) {
        const char *text = json_string_value(json_array_get(value, i));
        ok = text ? add_input(&row->inputs, column, text, why, why_bytes) : false;
        if (!text)
            refuse(why, why_bytes, "'%s' is a list of something else than strings", column_names[column]);
    }
    return json_is_string(value) || json_is_array(value) ? ok : refuse(why, why_bytes, "'%s' is not a string or a list of strings",
                                                                       column_names[column]);
}

/* A value of a known column as text, the form that set_column reads. */
static bool set_value(struct prompt_file *f, struct prompt_row *row, enum column column, const json_t *value, char *why,
                      size_t why_bytes)
{
    char *number = f->numbers[column];
    const bool is_text = column == COLUMN_PROMPT || column == COLUMN_NEGATIVE || column == COLUMN_MODEL || column == COLUMN_NAME ||
                         column == COLUMN_MASK;
    if (column == COLUMN_LORA || column == COLUMN_IMAGE)
        return set_files(row, column, value, why, why_bytes);
    if (json_is_string(value)) /* the row's own copy: blanks may be cut off it */
        return set_column(row, column, (char *)(uintptr_t)json_string_value(value), why, why_bytes);
    if (!is_text && json_is_integer(value))
        snprintf(number, sizeof f->numbers[0], "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    else if (!is_text && json_is_real(value))
        snprintf(number, sizeof f->numbers[0], "%.17g", json_real_value(value));
    else
        return refuse(why, why_bytes, "'%s' is not a %s", column_names[column], is_text ? "string" : "number");
    return set_column(row, column, number, why, why_bytes);
}

static int write_label(const char *data, size_t bytes, void *context)
{
    json_text_add(context, data, bytes);
    return 0;
}

/* Names of members that are labels, for prompt_file_labels; a few will do. */
static bool note_label(struct prompt_file *f, const char *name)
{
    for (int i = 0; i < f->column_count; i++)
        if (strcmp(f->labels[i], name) == 0)
            return true;
    if (f->column_count == LABELS_NOTED)
        return true;
    if (!f->labels && !(f->labels = calloc(LABELS_NOTED, sizeof *f->labels)))
        return false;
    f->labels[f->column_count] = strdup(name);
    return f->labels[f->column_count] && ++f->column_count;
}

/* Known members become columns and leave the object; what stays are the labels. */
static bool set_members(struct prompt_file *f, struct prompt_row *row, char *why, size_t why_bytes)
{
    const char *key;
    json_t *value;
    void *next;
    bool seen[COLUMN_LABEL] = {false};
    json_t *labels = json_object();
    bool ok = labels != NULL || refuse(why, why_bytes, "no memory for the labels");
    json_object_foreach_safe(f->object, next, key, value)
    {
        enum column column = column_of(key);
        if (!ok)
            break;
        if (column == COLUMN_LABEL && !note_label(f, key))
            ok = refuse(why, why_bytes, "no memory for the labels");
        else if (column == COLUMN_LABEL)
            ok = json_object_set(labels, key, value) == 0 || refuse(why, why_bytes, "no memory for the labels");
        else if (seen[column])
            ok = refuse(why, why_bytes, "two members are named '%s'; accepted is each name once", column_names[column]);
        else if (!json_is_null(value))
            ok = set_value(f, row, column, value, why, why_bytes);
        if (column != COLUMN_LABEL)
            seen[column] = true;
    }
    if (ok && json_object_size(labels) > 0) {
        json_text_clear(&f->label_text);
        ok = json_dump_callback(labels, write_label, &f->label_text, JSON_COMPACT) == 0 && !f->label_text.failed;
        if (!ok)
            refuse(why, why_bytes, "no memory for the labels");
        row->labels_json = f->label_text.data;
    }
    json_decref(labels);
    return ok;
}

static enum prompt_next next_jsonl(struct prompt_file *f, struct prompt_row *row, char *why, size_t why_bytes)
{
    size_t length = 0, whole;
    const char *text = "";
    char reason[512];
    json_error_t error;
    while (is_blank(text)) {
        enum prompt_next found = find_line(f, &length, &whole, why, why_bytes);
        if (found != PROMPT_ROW)
            return found;
        if (!text_ok(f, length, why, why_bytes))
            return PROMPT_BAD;
        f->buffer[f->begin + length] = 0;
        text = f->buffer + f->begin;
        f->begin += whole;
        f->line++;
    }
    *row = empty_row(f->line - 1);
    json_decref(f->object);
    f->object = parse_object(f, text, length, &error);
    if (!f->object)
        return refuse_at(f, row->line, why, why_bytes, "not valid JSON at byte %d: %s", error.position, error.text), PROMPT_WRONG;
    if (!json_is_object(f->object))
        return refuse_at(f, row->line, why, why_bytes, "not a JSON object; accepted is an object a line, as {\"prompt\":\"...\"}"),
               PROMPT_WRONG;
    if (!set_members(f, row, reason, sizeof reason))
        return refuse_at(f, row->line, why, why_bytes, "%s", reason), PROMPT_WRONG;
    return row_ok(f, row, why, why_bytes) ? PROMPT_ROW : PROMPT_WRONG;
}

/* --- opening ----------------------------------------------------------------------------------------- */

bool prompt_file_format_of(const char *name, enum prompt_format *ret)
{
    static const struct {
        const char *name;
        enum prompt_format format;
    } known[] = {{"txt", PROMPT_TXT}, {"csv", PROMPT_CSV}, {"tsv", PROMPT_TSV}, {"jsonl", PROMPT_JSONL}, {"ndjson", PROMPT_JSONL}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcasecmp(name, known[i].name) == 0) {
            *ret = known[i].format;
            return true;
        }
    return false;
}

static enum prompt_format format_by_title(const char *title)
{
    enum prompt_format format = PROMPT_AUTO;
    const char *dot = strrchr(title, '.'), *slash = strrchr(title, '/');
    if (dot && (!slash || dot > slash))
        prompt_file_format_of(dot + 1, &format);
    return format;
}

static bool skip_mark(struct prompt_file *f, char *why, size_t why_bytes)
{
    const unsigned char *b = (const unsigned char *)f->buffer;
    if (f->end >= 2 && ((b[0] == 0xff && b[1] == 0xfe) || (b[0] == 0xfe && b[1] == 0xff)))
        return refuse_at(f, 1, why, why_bytes, "the file is UTF-16; save it as UTF-8");
    if (f->end >= 3 && memcmp(b, "\xef\xbb\xbf", 3) == 0)
        f->begin = 3;
    return true;
}

/* Is one of the cells of the first line, and not the only one, called prompt? */
static bool has_header(const struct prompt_file *f, char separator)
{
    size_t cells = 0, found = 0, at = f->begin;
    for (bool is_more = true; is_more; at++) {
        size_t length = 0;
        while (at + length < f->end && !strchr("\r\n", f->buffer[at + length]) && f->buffer[at + length] != separator)
            length++;
        size_t quote = length >= 2 && f->buffer[at] == '"' && f->buffer[at + length - 1] == '"';
        found += length - 2 * quote == strlen("prompt") && strncasecmp(f->buffer + at + quote, "prompt", length - 2 * quote) == 0;
        cells++;
        at += length;
        is_more = at < f->end && f->buffer[at] == separator;
    }
    return found > 0 && cells > 1;
}

/* The format of a file whose name does not say it. A table taken for prompts would be rendered line by line. */
static bool take_format(struct prompt_file *f, char *why, size_t why_bytes)
{
    size_t i = f->begin;
    if (has_header(f, ',') || has_header(f, '\t'))
        return refuse_at(f, 1, why, why_bytes, "this looks like the header of a table: accepted is --input-format %s, or txt if the lines are "
                         "prompts", has_header(f, ',') ? "csv" : "tsv");
    while (i < f->end && f->buffer[i] && strchr(" \t\r\n", f->buffer[i]))
        i++;
    f->format = i < f->end && f->buffer[i] == '{' ? PROMPT_JSONL : PROMPT_TXT;
    return true;
}

static bool open_source(struct prompt_file **ret, const struct prompt_file *source, const char *title, char *why, size_t why_bytes)
{
    struct prompt_file *f = malloc(sizeof *f);
    if (!f)
        return refuse(why, why_bytes, "%s: no memory", title);
    *f = *source;
    f->line = 1;
    f->title = strdup(title);
    if (!f->title) {
        refuse(why, why_bytes, "%s: no memory", title);
        goto bad;
    }
    if (f->format == PROMPT_AUTO)
        f->format = format_by_title(title);
    while (!f->is_all && f->end < 4096) /* a pipe may give a byte at a time */
        if (!fill(f, why, why_bytes))
            goto bad;
    if (!skip_mark(f, why, why_bytes))
        goto bad;
    if (f->format == PROMPT_AUTO && !take_format(f, why, why_bytes))
        goto bad;
    if ((f->format == PROMPT_CSV || f->format == PROMPT_TSV) && !read_header(f, why, why_bytes))
        goto bad;
    *ret = f;
    return true;
bad:
    prompt_file_close(f);
    return false;
}

bool prompt_file_open(struct prompt_file **ret, int fd, const char *title, enum prompt_format format, char *why, size_t why_bytes)
{
    return open_source(ret, &(struct prompt_file){.fd = fd, .format = format}, title, why, why_bytes);
}

bool prompt_file_open_memory(struct prompt_file **ret, const void *data, size_t bytes, const char *title,
                             enum prompt_format format, char *why, size_t why_bytes)
{
    return open_source(ret, &(struct prompt_file){.fd = -1, .memory = data, .memory_left = bytes, .format = format}, title, why,
                       why_bytes);
}

enum prompt_next prompt_file_next(struct prompt_file *f, struct prompt_row *ret, char *why, size_t why_bytes)
{
    struct prompt_row row;
    enum prompt_next found;
    if (f->is_over)
        return PROMPT_END;
    if (f->format == PROMPT_TXT)
        found = next_txt(f, &row, why, why_bytes);
    else if (f->format == PROMPT_JSONL)
        found = next_jsonl(f, &row, why, why_bytes);
    else
        found = next_table(f, &row, why, why_bytes);
    f->is_over = found == PROMPT_END || found == PROMPT_BAD;
    if (found == PROMPT_ROW)
        *ret = row;
    return found;
}

void prompt_file_labels(const struct prompt_file *f, char *ret, size_t bytes)
{
    char part[48];
    size_t used = 0;
    ret[0] = 0;
    for (int i = 0; i < f->column_count && used < bytes; i++)
        if (!f->columns || f->columns[i] == COLUMN_LABEL)
            used += (size_t)snprintf(ret + used, bytes - used, "%s%s", used ? ", " : "", shown(f->labels[i], part));
}

void prompt_file_close(struct prompt_file *f)
{
    if (!f)
        return;
    for (int i = 0; i < f->column_count; i++)
        free(f->labels[i]);
    free(f->labels);
    free(f->columns);
    free(f->spans);
    tally_done(&f->names);
    json_text_done(&f->label_text);
    json_decref(f->object);
    free(f->buffer);
    free(f->title);
    free(f);
}
