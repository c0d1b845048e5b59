/* prompt_file.h - a file of prompts, row by row: txt, csv, tsv, jsonl.
 *
 *   txt     a prompt a line, without the blanks around it; '#' starts a comment line; blank lines are skipped
 *   csv     header line, RFC 4180 quotes, line ends inside quotes; a quote elsewhere is refused
 *   tsv     the same with tabs; a field in quotes that goes on after them ("Hi" written in red) is taken as it is written
 *   jsonl   an object a line
 *
 * Columns (case does not matter): prompt negative seed size (WxH) width height steps guidance model name image mask strength lora;
 * the rest travels as labels. image and lora may name several files: in a cell with ';' between them, in jsonl as a list of
 * strings. A file is read as a stream: a million
 * lines need no more memory than one, except 24 bytes for each name. Accepted at the start: a UTF-8 byte order mark; at line
 * ends: CRLF. Everything else that is not plain is refused with "FILE:LINE: what, found, accepted". */
#ifndef KILN_PROMPT_FILE_H
#define KILN_PROMPT_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "task_inputs.h"

#define PROMPT_FILE_LINE_MAX (1u << 20) /* bytes of a line, or of a row whose quotes hold line ends */
#define PROMPT_FILE_PROMPT_MAX 65536
#define PROMPT_FILE_COLUMNS_MAX 256
#define PROMPT_FILE_NAME_MAX 100
#define PROMPT_FILE_SIDE_MIN 64
#define PROMPT_FILE_PIXELS_MAX 4194304
#define PROMPT_FILE_STEPS_MAX 1000
#define PROMPT_FILE_GUIDANCE_MAX 100

enum prompt_format { PROMPT_AUTO, PROMPT_TXT, PROMPT_CSV, PROMPT_TSV, PROMPT_JSONL };

struct prompt_inputs { /* as people write them: task_inputs.h says what they mean */
    const char *images[TASK_INPUTS_IMAGES_MAX], *mask, *loras[TASK_INPUTS_LORAS_MAX]; /* mask NULL: not given */
    int image_count, lora_count;
    double strength;            /* 0: not given */
};

struct prompt_row { /* texts live until the next call */
    int64_t line;               /* where the row begins */
    const char *prompt;
    const char *negative, *model, *name; /* NULL: not given */
    bool has_seed;
    uint64_t seed;
    int width, height, steps;   /* 0: not given */
    bool has_size;              /* column size was given: both sides are from it */
    double guidance;            /* NaN: not given */
    struct prompt_inputs inputs;
    const char *labels_json;    /* an object, or NULL when there are none */
};

enum prompt_next {
    PROMPT_ROW,
    PROMPT_END,
    PROMPT_WRONG, /* a row that cannot be taken; the rows behind it can be read */
    PROMPT_BAD    /* nothing more can be read */
};

struct prompt_file;

/* prompt_file_open reads from fd, which stays the caller's; title names it in messages. PROMPT_AUTO: by the title's ending, else
 * by the first byte that is no blank: '{' is jsonl, all else txt, but a first line that looks like the header of a table is refused. prompt_file_open_memory borrows data. */
bool prompt_file_open(struct prompt_file **ret, int fd, const char *title, enum prompt_format format, char *why, size_t why_bytes);
bool prompt_file_open_memory(struct prompt_file **ret, const void *data, size_t bytes, const char *title,
                             enum prompt_format format, char *why, size_t why_bytes);
enum prompt_next prompt_file_next(struct prompt_file *f, struct prompt_row *ret, char *why, size_t why_bytes);
/* prompt_file_labels lists the names of labels seen so far, "shelf, sede": what is misspelt is among them. */
void prompt_file_labels(const struct prompt_file *f, char *ret, size_t bytes);
void prompt_file_close(struct prompt_file *f);

bool prompt_file_format_of(const char *name, enum prompt_format *ret); /* "txt" "csv" "tsv" "jsonl" */

/* The rules of a row's settings, for options of the same meaning. Each writes a sentence without a place. */
bool prompt_file_size_ok(int64_t width, int64_t height, char *why, size_t why_bytes);
bool prompt_file_read_size(const char *text, int *ret_width, int *ret_height, char *why, size_t why_bytes);
bool prompt_file_read_seed(const char *text, uint64_t *ret, char *why, size_t why_bytes);
bool prompt_file_read_steps(const char *text, int *ret, char *why, size_t why_bytes);
bool prompt_file_read_guidance(const char *text, double *ret, char *why, size_t why_bytes);

#endif
