/* submit.c - the steps of `kiln submit`, in order: options, input, checks, database, summary.
 *
 * A refused submission leaves nothing behind: the database is opened after the last check. What is
 * written then is idempotent, so that a submission that died half-way is simply run again. */
#include "submit.h"

#include "clock.h"
#include "image_plan.h"
#include "model_check.h"
#include "progress.h"
#include "prompt_file.h"
#include "row_inputs.h"
#include "store_dir.h"
#include "task_store.h"
#include "token_check.h"
#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PROGRESS_AFTER_MS 1000

#define MISTAKES_TOLD 10

struct submit {
    struct command_call *call;
    /* options as given; NULL or false: not */
    const char *file, *campaign, *model, *size, *steps, *guidance, *seed, *negative, *out, *format, *use, *input_format;
    const char *mask, *strength;
    struct command_list images, loras;
    int64_t seeds, priority;
    bool has_priority, truncate, wait, json, dry_run;
    /* what they come to */
    struct image_plan_defaults defaults;
    struct prompt_inputs input_options;
    struct row_inputs inputs;
    char labels[512];          /* names of what is no column of kiln's */
    enum prompt_format prompt_format;
    const char *title;         /* of the file in messages */
    int fd;
    /* what this home knows */
    struct home_model *models;
    int model_count;
    char tool[HOME_PATH_MAX];  /* kiln-worker, or "" */
    struct token_check *checks[HOME_MODELS_MAX]; /* beside models; NULL until a row needs it */
    bool is_known[HOME_MODELS_MAX];              /* licence looked at */
    char variants[HOME_MODELS_MAX][16];          /* "distilled", "base"; "unknown"; "": not looked at */
    bool has_warned;
    char *mistakes[MISTAKES_TOLD]; /* of the first pass: sentences with their places */
    int64_t mistake_count;
    bool is_token_told;        /* that a prompt is too long; its tokenizer counts no more */
    bool is_sending;           /* the second pass: the database may hold a part already */
    int64_t rows;
};

static const char usage[] =
    "  FILE is txt (a prompt a line), csv, tsv (with a header) or jsonl; - is standard input (txt, or jsonl where it begins\n"
    "  with '{', unless --input-format says it: a table needs that). Columns: prompt negative seed\n"
    "  size (WxH) width height steps guidance model name image mask strength lora; others travel as labels. Several images or adapters\n"
    "  of one row stand with ';' between them (in jsonl as a list); names are relative to FILE. Submitting again adds only\n"
    "  what is missing.\n"
    "\n"
    "  --campaign NAME       A-Z a-z 0-9 . _ - (1 to 100), no '.' in front\n"
    "  --model NAME          for rows that name none; may be left out when kiln is up with one model\n"
    "  --size WxH            for rows that give none (512x512, or the first --image's size up to 1 MP); multiples of 16,\n"
    "                        from 64, at most 4194304 pixels\n"
    "  --steps N             1 to 1000 (the model's own)\n"
    "  --guidance G          0 to 100 (the model's own)\n"
    "  --seeds N             images per row, each with its own seed (1)\n"
    "  --seed BASE           the campaign's base seed, from which seeds that no row gives are derived (0)\n"
    "  --negative TEXT       for rows that give none; a distilled model takes none\n"
    "  --image FILE          reference image for rows that name none: PNG, JPEG or WebP; up to 10 times\n"
    "  --mask FILE           for rows that name none: the first image is repainted where this picture is white\n"
    "  --strength S          with a mask: above 0, at most 1 (everything is new); 0.8\n"
    "  --lora FILE[:SCALE]   adapter for rows that name none; up to 16 times; -100 to 100, scale 1. LoRA runs beside the weights, so rows\n"
    "                        may differ in it; LoHa, LoKr and DoRA are merged, and a worker loads the transformer where they change\n"
    "  --out DIR             folder of the images (HOME/images/NAME); its parent must exist\n"
    "  --format png|jpg|webp (png)\n"
    "  --use commercial|non-commercial   models whose licence says no are refused\n"
    "  --priority N          higher first, -1000 to 1000 (0)\n"
    "  --truncate            cut prompts of more than 512 tokens, and record it\n"
    "  --input-format txt|csv|tsv|jsonl  when the file's name does not say it\n"
    "  --dry-run             check everything, write nothing\n"
    "  --wait                stay until the campaign is finished: 0 all done, 1 some failed\n"
    "  --json                {\"campaign\",\"added\",\"present\",\"total\"}\n";

/* --- words of the command line ------------------------------------------------------------------------- */

bool submit_campaign_ok(const char *name, char *why, size_t why_bytes)
{
    static const char accepted[] = "accepted are 1 to 100 of A-Z a-z 0-9 . _ - and no '.' in front";
    size_t plain = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
    const unsigned char *bad = (const unsigned char *)name + plain;
    int length = *bad >= 0xf0 ? 4 : *bad >= 0xe0 ? 3 : *bad >= 0xc0 ? 2 : 1; /* show the whole character */
    if (*bad && (*bad < 0x20 || *bad == 0x7f || json_text_utf8_fault((const char *)bad, strnlen((const char *)bad, (size_t)length)) !=
                                                    (size_t)length))
        snprintf(why, why_bytes, "campaign name: byte 0x%02x at position %zu; %s", *bad, plain + 1, accepted);
    else if (*bad)
        snprintf(why, why_bytes, "campaign name '%.120s': character '%.*s' at position %zu; %s", name, length, (const char *)bad,
                 plain + 1, accepted);
    else if (!*name)
        snprintf(why, why_bytes, "campaign name is empty; %s", accepted);
    else if (*name == '.')
        snprintf(why, why_bytes, "campaign name '%.120s' begins with '.'; %s", name, accepted);
    else if (plain > 100)
        snprintf(why, why_bytes, "campaign name of %zu characters; %s", plain, accepted);
    else
        return true;
    return false;
}

static bool is_one_of(const char *word, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(word, *list) == 0)
            return true;
    return false;
}

/* --image, --mask, --strength, --lora: the words; the files are opened with the first row that needs them. */
static bool read_input_words(struct submit *s, char *why, size_t why_bytes)
{
    struct prompt_inputs *in = &s->input_options;
    size_t length;
    double scale;
    if (s->images.count > TASK_INPUTS_IMAGES_MAX || s->loras.count > TASK_INPUTS_LORAS_MAX) {
        snprintf(why, why_bytes, "--image and --lora: accepted are at most %d images and %d adapters", TASK_INPUTS_IMAGES_MAX,
                 TASK_INPUTS_LORAS_MAX);
        return false;
    }
    for (int i = 0; i < s->images.count; i++)
        in->images[in->image_count++] = s->images.items[i];
    for (int i = 0; i < s->loras.count; i++)
        if (!task_inputs_read_lora(in->loras[in->lora_count++] = s->loras.items[i], &length, &scale, why, why_bytes))
            return false;
    in->mask = s->mask;
    return !s->strength || task_inputs_read_strength(s->strength, &in->strength, why, why_bytes);
}

static int read_words(struct submit *s)
{
    struct command_call *call = s->call;
    char why[512] = "";
    struct image_plan_defaults *d = &s->defaults;
    if (!s->campaign)
        return command_refuse(call, "--campaign NAME is needed");
    if (s->out && strncmp(s->out, "s3://", 5) == 0)
        return command_refuse(call, "--out %s: this build writes to folders only; give a folder", s->out);
    if (s->format && !is_one_of(s->format, (const char *const[]){"png", "jpg", "webp", NULL}))
        return command_refuse(call, "--format '%s': accepted are png, jpg, webp", s->format);
    if (s->use && !is_one_of(s->use, (const char *const[]){"commercial", "non-commercial", NULL}))
        return command_refuse(call, "--use '%s': accepted are commercial, non-commercial", s->use);
    if (s->input_format && !prompt_file_format_of(s->input_format, &s->prompt_format))
        return command_refuse(call, "--input-format '%s': accepted are txt, csv, tsv, jsonl", s->input_format);
    if (s->negative && (json_text_utf8_fault(s->negative, strlen(s->negative)) != strlen(s->negative) ||
                        strlen(s->negative) > PROMPT_FILE_PROMPT_MAX))
        return command_refuse(call, "--negative: accepted is UTF-8 text of at most %d bytes", PROMPT_FILE_PROMPT_MAX);
    if (!submit_campaign_ok(s->campaign, why, sizeof why) ||
        (s->size && !prompt_file_read_size(s->size, &d->width, &d->height, why, sizeof why)) ||
        (s->steps && !prompt_file_read_steps(s->steps, &d->steps, why, sizeof why)) ||
        (s->guidance && !prompt_file_read_guidance(s->guidance, &d->guidance, why, sizeof why)) ||
        (s->seed && !prompt_file_read_seed(s->seed, &d->base_seed, why, sizeof why)) || !read_input_words(s, why, sizeof why))
        return command_refuse(call, "%s", why);
    d->model = s->model;
    d->negative = s->negative;
    d->variations = (int)s->seeds;
    d->truncate = s->truncate;
    return COMMAND_DONE;
}

/* --- the input ----------------------------------------------------------------------------------------- */

static int temporary_file(void)
{
    const char *dir = getenv("TMPDIR");
    char path[PATH_MAX];
    if (!dir || !*dir)
        dir = "/tmp";
    int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0)
        return fd;
    if ((size_t)snprintf(path, sizeof path, "%s/kiln-submit.XXXXXX", dir) >= sizeof path)
        return -1;
    fd = mkostemp(path, O_CLOEXEC);
    if (fd >= 0)
        unlink(path);
    return fd;
}

/* Copies what can be read only once to a file that can be read twice. */
static int spool_input(struct submit *s, int source)
{
    static char data[1 << 18];
    s->fd = temporary_file();
    if (s->fd < 0)
        return command_refuse(s->call, "%s: no temporary file for it in %s: %s", s->title,
                              getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", strerror(errno));
    for (;;) {
        ssize_t got = read(source, data, sizeof data);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return command_refuse(s->call, "%s: cannot be read: %s", s->title, strerror(errno));
        if (got == 0)
            return COMMAND_DONE;
        for (ssize_t put = 0, done = 0; done < got; done += put)
            if ((put = write(s->fd, data + done, (size_t)(got - done))) < 0)
                return command_refuse(s->call, "%s: cannot be kept in a temporary file: %s", s->title, strerror(errno));
    }
}

static int open_input(struct submit *s)
{
    struct stat info;
    s->title = s->file;
    if (strcmp(s->file, "-") == 0) {
        s->title = "stdin";
        return spool_input(s, STDIN_FILENO);
    }
    if (strncmp(s->file, "s3://", 5) == 0)
        return command_refuse(s->call, "%s: this build reads files and standard input only", s->file);
    s->fd = open(s->file, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0)
        return command_refuse(s->call, "%s: cannot be opened: %s", s->file, strerror(errno));
    if (fstat(s->fd, &info) == 0 && S_ISDIR(info.st_mode))
        return command_refuse(s->call, "%s: is a folder; accepted is a file of prompts", s->file);
    if (lseek(s->fd, 0, SEEK_SET) == 0)
        return COMMAND_DONE;
    int pipe_fd = s->fd, code = spool_input(s, pipe_fd);
    close(pipe_fd);
    return code;
}

/* --- models -------------------------------------------------------------------------------------------- */

static int find_models(struct submit *s)
{
    char why[1024];
    if (!home_models(&s->call->home, &s->models, &s->model_count, why, sizeof why))
        return command_refuse(s->call, "%s", why);
    if (!home_tool("kiln-worker", s->tool, sizeof s->tool, why, sizeof why))
        s->tool[0] = 0;
    if (!s->defaults.model && s->model_count == 1)
        s->defaults.model = s->models[0].name;
    return COMMAND_DONE;
}

static int model_index(const struct submit *s, const char *name)
{
    for (int i = 0; i < s->model_count; i++)
        if (strcmp(s->models[i].name, name) == 0)
            return i;
    return -1;
}

/* Once per model: may it be used for this? */
static int check_licence(struct submit *s, int index)
{
    char licence[128], why[HOME_PATH_MAX + 512];
    const struct home_model *model = &s->models[index];
    s->is_known[index] = true;
    if (!s->use || strcmp(s->use, "commercial") != 0 || !s->tool[0])
        return COMMAND_DONE;
    if (!model_check_read(s->tool, model->dir, "licence", licence, sizeof licence, why, sizeof why))
        return command_refuse(s->call, "%s", why);
    if (!model_check_is_commercial(licence))
        return command_refuse(s->call, "model '%s' has the licence %s: --use commercial is not allowed with it; take another model, or "
                              "--use non-commercial if that is what it is", model->name, licence);
    if (strcmp(licence, "unknown") == 0)
        fprintf(stderr, "kiln submit: note: the licence of model '%s' is not known to kiln; whether it allows commercial use is for "
                        "you to know\n", model->name);
    return COMMAND_DONE;
}

/* --- first pass: every row is looked at ------------------------------------------------------------------ */

/* Keeps a mistake, so that all of a file are told at once; the first pass goes on. */
static int note_mistake(struct submit *s, const char *sentence)
{
    if (s->mistake_count < MISTAKES_TOLD && !(s->mistakes[s->mistake_count] = strdup(sentence)))
        return command_refuse(s->call, "%s; nothing was added", sentence);
    s->mistake_count++;
    return COMMAND_DONE;
}

static int note_row(struct submit *s, int64_t line, const char *sentence)
{
    char text[HOME_PATH_MAX * 2 + 64];
    snprintf(text, sizeof text, "%s:%" PRId64 ": %s", s->title, line, sentence);
    return note_mistake(s, text);
}

static int tell_mistakes(struct submit *s)
{
    const int64_t told = s->mistake_count < MISTAKES_TOLD ? s->mistake_count : MISTAKES_TOLD;
    if (s->mistake_count == 0)
        return COMMAND_DONE;
    if (s->mistake_count == 1)
        return command_refuse(s->call, "%s; nothing was added", s->mistakes[0]);
    for (int64_t i = 0; i < told; i++)
        command_refuse(s->call, "%s", s->mistakes[i]);
    if (told < s->mistake_count)
        return command_refuse(s->call, "%s: %" PRId64 " more mistakes like these; nothing was added", s->title, s->mistake_count - told);
    return command_refuse(s->call, "%s: %" PRId64 " mistakes; nothing was added", s->title, told);
}

/* What cannot be told here is for the worker to find out. */
static const char *variant_of(struct submit *s, int index)
{
    char why[HOME_PATH_MAX + 512], *variant = s->variants[index];
    if (!*variant && !model_check_read(s->tool, s->models[index].dir, "variant", variant, sizeof s->variants[index], why, sizeof why))
        snprintf(variant, sizeof s->variants[index], "unknown");
    return variant;
}

static bool takes_negative(struct submit *s, int index)
{
    return !s->tool[0] || strcmp(variant_of(s, index), "distilled") != 0;
}

static int refuse_negative(struct submit *s, int index, const struct prompt_row *row)
{
    char text[HOME_NAME_MAX + 160];
    snprintf(text, sizeof text, "negative prompt: model '%s' is distilled and cannot use one; leave it out or take a base model",
             s->models[index].name);
    return note_row(s, row->line, text);
}

/* Tokens are counted beside us: of prompts that are too long the first is told. */
static int refuse_tokens(struct submit *s, int64_t line, const char *why)
{
    s->is_token_told = true;
    return line ? note_row(s, line, why) : command_refuse(s->call, "%s", why);
}

static int check_tokens(struct submit *s, int index, const struct prompt_row *row, const char *negative)
{
    char why[HOME_PATH_MAX * 2];
    int64_t line = 0;
    const bool is_long[2] = {token_check_may_be_long(row->prompt), *negative && token_check_may_be_long(negative)};
    if (s->truncate || s->is_token_told || !s->tool[0] || (!is_long[0] && !is_long[1]))
        return COMMAND_DONE;
    if (!s->checks[index] && !token_check_open(&s->checks[index], s->tool, s->models[index].dir, why, sizeof why))
        return command_refuse(s->call, "%s", why);
    if (token_check_add(s->checks[index], row->line, "prompt", row->prompt, &line, why, sizeof why) &&
        token_check_add(s->checks[index], row->line, "negative prompt", negative, &line, why, sizeof why))
        return COMMAND_DONE;
    return refuse_tokens(s, line, why);
}

static int finish_tokens(struct submit *s)
{
    for (int i = 0; i < s->model_count && !s->is_token_told; i++) {
        char why[HOME_PATH_MAX * 2];
        int64_t line = 0;
        if (s->checks[i] && !token_check_finish(s->checks[i], &line, why, sizeof why))
            return refuse_tokens(s, line, why);
    }
    return COMMAND_DONE;
}

/* A model that nobody here has is no error, another machine may bring it; but it is most often a slip. */
static void warn_model(struct submit *s, const char *model)
{
    if (s->has_warned || s->model_count == 0)
        return;
    s->has_warned = true;
    fprintf(stderr, "kiln submit: note: kiln is not up with model '%s' here; its images wait for a worker that has it (known: %s%s)\n",
            model, s->models[0].name, s->model_count > 1 ? ", ..." : "");
}

static int check_row(struct submit *s, const struct image_plan *plan, const struct prompt_row *row)
{
    char why[HOME_PATH_MAX + 1024];
    struct task_inputs inputs;
    if (!row_inputs_of(&s->inputs, row, &inputs, why, sizeof why))
        return note_row(s, row->line, why);
    bool ok = image_plan_check(plan, row, &inputs, why, sizeof why);
    task_inputs_done(&inputs);
    if (!ok)
        return note_row(s, row->line, why);
    const char *model = image_plan_model(plan, row);
    int index = model_index(s, model), code = COMMAND_DONE;
    if (index < 0) {
        warn_model(s, model);
        return COMMAND_DONE;
    }
    const char *negative = image_plan_negative(plan, row);
    if (!s->is_known[index])
        code = check_licence(s, index);
    if (code == COMMAND_DONE && *negative && !takes_negative(s, index))
        return refuse_negative(s, index, row);
    return code != COMMAND_DONE ? code : check_tokens(s, index, row, negative);
}

/* A bar for long work, on a terminal only: logs and pipes get the summary. */
struct meter {
    struct progress bar;
    struct progress_now now;
    int64_t began_ms;
    bool is_wanted, is_shown;
    const char *label;
};

static void meter_begin(struct meter *m, const char *label, int64_t total)
{
    *m = (struct meter){.now = PROGRESS_UNKNOWN, .began_ms = clock_ms(), .is_wanted = isatty(STDERR_FILENO), .label = label};
    m->now.total = total;
}

static void meter_step(struct meter *m)
{
    m->now.done++;
    if (!m->is_wanted || (m->now.done & 1023) != 0 || (!m->is_shown && clock_ms() - m->began_ms < PROGRESS_AFTER_MS))
        return;
    if (!m->is_shown)
        progress_begin(&m->bar, stderr, m->label, "images");
    m->is_shown = true;
    progress_update(&m->bar, &m->now);
}

static void meter_end(struct meter *m)
{
    if (m->is_shown)
        progress_clear(&m->bar);
}

/* Calls `each` with every row of the input, from its beginning. */
static int each_row(struct submit *s, int (*each)(struct submit *, void *, const struct prompt_row *), void *context)
{
    struct prompt_file *file = NULL;
    struct prompt_row row;
    char why[2048];
    const char *outcome = s->is_sending ? "the file changed while it was read; submit it again" : "nothing was added";
    int code = COMMAND_DONE;
    enum prompt_next next;
    if (lseek(s->fd, 0, SEEK_SET) != 0)
        return command_refuse(s->call, "%s: cannot be read again: %s", s->title, strerror(errno));
    if (!prompt_file_open(&file, s->fd, s->title, s->prompt_format, why, sizeof why))
        return command_refuse(s->call, "%s; %s", why, outcome);
    while (code == COMMAND_DONE && (next = prompt_file_next(file, &row, why, sizeof why)) != PROMPT_END) {
        if (next == PROMPT_ROW)
            code = each(s, context, &row);
        else
            code = s->is_sending ? command_refuse(s->call, "%s; %s", why, outcome) : note_mistake(s, why);
        if (next == PROMPT_BAD)
            break;
    }
    prompt_file_labels(file, s->labels, sizeof s->labels);
    prompt_file_close(file);
    return code;
}

struct checking {
    struct image_plan plan;
    struct meter meter;
};

static int check_each(struct submit *s, void *context, const struct prompt_row *row)
{
    struct checking *c = context;
    s->rows++;
    meter_step(&c->meter);
    return check_row(s, &c->plan, row);
}

static int check_input(struct submit *s)
{
    struct checking c;
    image_plan_init(&c.plan, &s->defaults);
    meter_begin(&c.meter, "check", -1);
    int code = each_row(s, check_each, &c);
    if (code == COMMAND_DONE)
        code = finish_tokens(s);
    meter_end(&c.meter);
    if (code == COMMAND_DONE)
        code = tell_mistakes(s);
    image_plan_done(&c.plan);
    if (code == COMMAND_DONE && s->rows == 0)
        code = command_refuse(s->call, "%s: no prompts in it; nothing was added", s->title);
    if (code == COMMAND_DONE && s->rows > INT_MAX)
        code = command_refuse(s->call, "%s: %" PRId64 " rows; accepted are at most %d", s->title, s->rows, INT_MAX);
    return code;
}

/* --- second pass: rows go to the database ------------------------------------------------------------------ */

struct sending {
    struct task_store *store;
    struct image_plan plan;
    struct meter meter;
    struct pg_error fault;
};

static bool send_image(void *context, const struct task_row *image)
{
    struct sending *n = context;
    meter_step(&n->meter);
    return task_store_submit_row(n->store, image, &n->fault);
}

static int send_each(struct submit *s, void *context, const struct prompt_row *row)
{
    struct sending *n = context;
    struct task_inputs inputs;
    char why[HOME_PATH_MAX + 1024] = "";
    bool ok = row_inputs_of(&s->inputs, row, &inputs, why, sizeof why);
    if (ok) {
        ok = image_plan_row(&n->plan, row, &inputs, send_image, n, why, sizeof why);
        task_inputs_done(&inputs);
    }
    if (ok)
        return COMMAND_DONE;
    return why[0] ? command_refuse(s->call, "%s:%" PRId64 ": %s", s->title, row->line, why) : command_fault(s->call, &n->fault);
}

/* A campaign that is submitted to again keeps its use; the models of these rows must allow it as well. */
static int check_kept_use(struct submit *s, const struct campaign *campaign)
{
    int code = COMMAND_DONE;
    if (s->use)
        return COMMAND_DONE;
    s->use = campaign->use;
    for (int i = 0; code == COMMAND_DONE && i < s->model_count; i++)
        if (s->is_known[i])
            code = check_licence(s, i);
    return code;
}

/* The second reading must find what the first one checked. */
static int send_all(struct submit *s, struct sending *n)
{
    int code = each_row(s, send_each, n);
    if (code == COMMAND_DONE && n->plan.row != s->rows)
        code = command_refuse(s->call, "%s: changed while it was read (%" PRId64 " rows, then %d); submit it again", s->title, s->rows,
                              n->plan.row);
    return code;
}

/* The images' folder: what the campaign has, --out, or the home's. Absolute. */
static int choose_folder(struct submit *s, const struct campaign *existing, char ret[PATH_MAX])
{
    char path[PATH_MAX], relative[160];
    struct store_error why;
    if (existing && !s->out) {
        snprintf(ret, PATH_MAX, "%s", existing->out_dir);
        return COMMAND_DONE;
    }
    if (s->out) {
        /* Only the last folder is made: a path that is missing further up is a disk that is not mounted. */
        snprintf(path, sizeof path, "%s", s->out);
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return command_refuse(s->call, "--out %s: the folder cannot be made: %s%s", s->out, strerror(errno),
                                  errno == ENOENT ? "; its parent must exist" : "");
    } else {
        snprintf(relative, sizeof relative, "images/%s", s->campaign);
        home_path(&s->call->home, path, sizeof path, relative);
    }
    if (!store_dir_prepare(path, !s->out, &why))
        return command_refuse(s->call, "%s", why.text);
    if (!realpath(path, ret))
        return command_refuse(s->call, "%s: %s", path, strerror(errno));
    return COMMAND_DONE;
}

/* Finds or makes the campaign. What an option does not say, an existing campaign keeps. */
static int open_campaign(struct submit *s, struct task_store *store, struct campaign *ret)
{
    char folder[PATH_MAX];
    struct campaign existing = {0};
    struct pg_error why;
    bool found = false;
    if (!task_store_campaign_find(store, s->campaign, &existing, &found, &why))
        return command_fault(s->call, &why);
    int code = choose_folder(s, found ? &existing : NULL, folder);
    if (code == COMMAND_DONE) {
        struct campaign_spec spec = {
            .name = s->campaign,
            .out_dir = folder,
            .format = s->format ? s->format : found ? existing.format : "png",
            .use = s->use ? s->use : found ? existing.use : "",
            .priority = s->has_priority || !found ? (int)s->priority : existing.priority,
            .base_seed = s->seed || !found ? s->defaults.base_seed : existing.base_seed,
        };
        if (!task_store_campaign(store, &spec, ret, &why))
            code = command_fault(s->call, &why);
    }
    task_store_campaign_done(&existing);
    return code;
}

static int send(struct submit *s, struct task_submitted *ret)
{
    struct campaign campaign = {0};
    struct sending n = {0};
    bool is_sent = false;
    int code = command_store(s->call, &n.store);
    if (code != COMMAND_DONE)
        return code;
    code = open_campaign(s, n.store, &campaign);
    if (code != COMMAND_DONE)
        goto done;
    code = check_kept_use(s, &campaign);
    if (code != COMMAND_DONE)
        goto done;
    s->is_sending = true;
    s->defaults.format = campaign.format;
    s->defaults.base_seed = campaign.base_seed;
    image_plan_init(&n.plan, &s->defaults);
    meter_begin(&n.meter, "submit", s->rows * s->seeds);
    if (!task_store_submit_begin(n.store, campaign.id, &n.fault))
        code = command_fault(s->call, &n.fault);
    else
        code = send_all(s, &n);
    if (code == COMMAND_DONE)
        is_sent = task_store_submit_end(n.store, ret, &n.fault);
    meter_end(&n.meter);
    if (code == COMMAND_DONE && !is_sent)
        code = command_fault(s->call, &n.fault);
    image_plan_done(&n.plan);
done:
    task_store_campaign_done(&campaign);
    task_store_close(n.store);
    return code;
}

/* --- the command ------------------------------------------------------------------------------------------ */

static void report(const struct submit *s, const struct task_submitted *sent)
{
    if (s->dry_run && s->json)
        printf("{\"campaign\":\"%s\",\"rows\":%" PRId64 ",\"total\":%" PRId64 ",\"dry_run\":true}\n", s->campaign, s->rows,
               s->rows * s->seeds);
    else if (s->dry_run)
        printf("campaign %s: %" PRId64 " rows, %" PRId64 " images; all is well, nothing was written\n", s->campaign, s->rows,
               s->rows * s->seeds);
    else if (s->json)
        printf("{\"campaign\":\"%s\",\"added\":%" PRId64 ",\"present\":%" PRId64 ",\"total\":%" PRId64 "}\n", s->campaign, sent->added,
               sent->present, sent->added + sent->present);
    else
        printf("campaign %s: %" PRId64 " added, %" PRId64 " already present\n", s->campaign, sent->added, sent->present);
    if (!s->json && s->labels[0]) /* a misspelt column is one of them */
        printf("labels: %s\n", s->labels);
    fflush(stdout);
}

static int steps(struct submit *s)
{
    struct task_submitted sent = {0};
    int code = read_words(s);
    if (code == COMMAND_DONE)
        code = find_models(s);
    if (code == COMMAND_DONE)
        code = open_input(s);
    if (code == COMMAND_DONE && !row_inputs_begin(&s->inputs, s->title == s->file ? s->title : NULL, &s->input_options))
        code = command_refuse(s->call, "no memory");
    if (code == COMMAND_DONE)
        code = check_input(s);
    if (code == COMMAND_DONE && !s->dry_run)
        code = send(s, &sent);
    if (code == COMMAND_DONE)
        report(s, &sent);
    if (code == COMMAND_DONE && s->wait && !s->dry_run)
        code = watch_campaign(s->call, s->campaign, stderr);
    return code;
}

static int submit_run(struct command_call *call)
{
    enum { PRIORITY_NONE = INT_MIN };
    struct submit s = {.call = call, .fd = -1, .seeds = 1, .priority = PRIORITY_NONE};
    s.defaults = (struct image_plan_defaults){.guidance = NAN, .variations = 1,
                                              .format = "png"};
    const struct command_option options[] = {
        {"campaign", COMMAND_TEXT, &s.campaign, 0, 0},
        {"model", COMMAND_TEXT, &s.model, 0, 0},
        {"size", COMMAND_TEXT, &s.size, 0, 0},
        {"steps", COMMAND_TEXT, &s.steps, 0, 0},
        {"guidance", COMMAND_TEXT, &s.guidance, 0, 0},
        {"seeds", COMMAND_NUMBER, &s.seeds, 1, IMAGE_PLAN_SEEDS_MAX},
        {"seed", COMMAND_TEXT, &s.seed, 0, 0},
        {"negative", COMMAND_TEXT, &s.negative, 0, 0},
        {"image", COMMAND_LIST, &s.images, 0, 0},
        {"mask", COMMAND_TEXT, &s.mask, 0, 0},
        {"strength", COMMAND_TEXT, &s.strength, 0, 0},
        {"lora", COMMAND_LIST, &s.loras, 0, 0},
        {"out", COMMAND_TEXT, &s.out, 0, 0},
        {"format", COMMAND_TEXT, &s.format, 0, 0},
        {"use", COMMAND_TEXT, &s.use, 0, 0},
        {"priority", COMMAND_NUMBER, &s.priority, -1000, 1000},
        {"input-format", COMMAND_TEXT, &s.input_format, 0, 0},
        {"truncate", COMMAND_FLAG, &s.truncate, 0, 0},
        {"dry-run", COMMAND_FLAG, &s.dry_run, 0, 0},
        {"wait", COMMAND_FLAG, &s.wait, 0, 0},
        {"json", COMMAND_FLAG, &s.json, 0, 0},
    };
    int word_count;
    if (!command_parse(call, options, sizeof options / sizeof *options, &s.file, 1, 1, &word_count))
        return command_code(call);
    s.has_priority = s.priority != PRIORITY_NONE;
    if (!s.has_priority)
        s.priority = 0;
    int code = steps(&s);
    for (int i = 0; i < HOME_MODELS_MAX; i++)
        token_check_close(s.checks[i]);
    row_inputs_done(&s.inputs);
    for (int i = 0; i < MISTAKES_TOLD; i++)
        free(s.mistakes[i]);
    free(s.models);
    if (s.fd >= 0)
        close(s.fd);
    return code;
}

const struct command submit_command = {"submit", "FILE|- --campaign NAME [options]", "give a file of prompts to the farm", usage,
                                       submit_run};
