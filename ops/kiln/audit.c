/* audit.c - the invariants as SQL, then every image's file: there, same size, same SHA-256; and no file that nobody knows.
 *
 * It may run while the farm works. The order makes that safe: a file gets its official name only after its row is
 * committed, so folders are listed first and rows are read after; a row whose file is not there yet is looked at
 * again at the end. Several campaigns may share a folder: a file is an orphan only when none of them knows it.
 *
 * --repair has what is missing or damaged rendered again. First a damaged file leaves its name (it is renamed, not removed), then
 * the database takes the image back: killed in between, the image is a missing one and the next repair finds it. */
#include "audit.h"

#include "clock.h"
#include "digest.h"
#include "json_text.h"
#include "progress.h"
#include "store_dir.h"
#include "table.h"
#include "tally.h"
#include "task_store.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXAMPLES 5              /* violations that are named */
#define SECOND_LOOK_MS 2000
#define STAGED_GRACE_S 120      /* the coordinator's janitor clears up within this */

enum mark { MARK_NONE, MARK_ON_DISK, MARK_KNOWN };

struct finding {
    const char *check;
    int64_t violations;
    struct json_text examples; /* JSON strings, comma between */
};

struct folder {
    const char *path;
    struct tally files;        /* by name; mark says what is known */
    bool is_wanted;            /* a campaign that is audited writes here */
    int64_t running;           /* of all campaigns that write here */
};

struct lost {                  /* an image whose file is not what its row says */
    const struct campaign *campaign;
    uint64_t task;
    char *path;
    bool is_missing;           /* else damaged */
    bool is_over;              /* it was on its way, or cannot be repaired */
};

struct audit {
    struct command_call *call;
    struct task_store *store;
    bool json, repair;
    const char *name;
    struct campaign *campaigns;
    int campaign_count;
    const struct campaign *campaign; /* whose rows are being read */
    struct folder *folder, *folders;
    int folder_count;
    bool is_checked;                 /* the rows being read are audited, not only known */
    int64_t violations;
    struct finding missing, damaged, orphan, staged;
    struct lost *lost;
    size_t lost_count, lost_room;
    struct progress bar;
    struct progress_now now;
    bool has_bar;
};

static const char usage[] = "  Without NAME: all campaigns. Reads every image's file. Exit code 0: clean, 1: something is not as it should be.\n"
                            "  --repair   images whose file is missing or damaged are rendered again; a damaged file is kept as FILE.damaged (.damaged-2, ..)\n"
                            "  --json     {\"check\",\"violations\",\"examples\"}; with --repair, at the end, {\"rendered_again\"}\n";

static void found(struct finding *f, const char *path)
{
    if (++f->violations > EXAMPLES)
        return;
    if (f->examples.length)
        json_text_put(&f->examples, ",");
    json_text_text(&f->examples, path);
}

static void print_finding(struct audit *a, const char *check, int64_t violations, const char *examples)
{
    a->violations += violations;
    if (a->json) {
        printf("{\"check\":\"%s\",\"violations\":%" PRId64 ",\"examples\":[%s]}\n", check, violations, examples);
        return;
    }
    printf("%-4s  %-32s %" PRId64 "%s%s\n", violations ? "FAIL" : "ok", check, violations, *examples ? "  " : "", examples);
}

/* --- campaigns and folders ------------------------------------------------------------------------------ */

bool audit_is_ours(const char *file)
{
    const char *dot = strrchr(file, '.');
    if (!dot || dot - file < 10 || !store_dir_file_ok(file))
        return false;
    if (strcmp(dot, ".png") != 0 && strcmp(dot, ".jpg") != 0 && strcmp(dot, ".webp") != 0)
        return false;
    return dot[-9] == '-' && strspn(dot - 8, "0123456789abcdef") == 8;
}

static struct folder *folder_of(struct audit *a, const char *path)
{
    for (int i = 0; i < a->folder_count; i++)
        if (strcmp(a->folders[i].path, path) == 0)
            return &a->folders[i];
    a->folders[a->folder_count].path = path;
    return &a->folders[a->folder_count++];
}

static bool is_audited(const struct audit *a, const struct campaign *c)
{
    return !a->name || strcmp(a->name, c->name) == 0;
}

static int read_campaigns(struct audit *a)
{
    struct pg_error why;
    int wanted = 0;
    if (!task_store_campaigns(a->store, &a->campaigns, &a->campaign_count, &why))
        return command_fault(a->call, &why);
    a->folders = calloc((size_t)a->campaign_count + 1, sizeof *a->folders);
    if (!a->folders)
        return command_say(a->call, COMMAND_FAILED, "no memory for %d campaigns", a->campaign_count);
    for (int i = 0; i < a->campaign_count; i++) {
        const struct campaign *c = &a->campaigns[i];
        struct folder *folder = folder_of(a, c->out_dir);
        folder->running += c->running;
        if (is_audited(a, c)) {
            folder->is_wanted = true;
            a->now.total += c->done;
            wanted++;
        }
    }
    if (a->name && wanted == 0)
        return command_refuse(a->call, "there is no campaign '%s'; `kiln status` lists them", a->name);
    return COMMAND_DONE;
}

static struct tally_slot *slot_of(struct folder *folder, const char *file)
{
    uint8_t key[32];
    digest_bytes(file, strlen(file), key);
    return tally_add(&folder->files, key);
}

/* Calls `each` with every file in the folder that looks like ours. A folder that is gone has none: its images are
 * reported as missing, one by one. */
static bool each_file(struct audit *a, struct folder *folder, bool (*each)(struct audit *, struct folder *, const char *))
{
    DIR *dir = opendir(folder->path);
    bool ok = true;
    if (!dir)
        return errno == ENOENT || command_say(a->call, COMMAND_FAILED, "%s: cannot be listed: %s", folder->path, strerror(errno)) < 0;
    for (struct dirent *e; ok && (e = readdir(dir));)
        if (audit_is_ours(e->d_name))
            ok = each(a, folder, e->d_name);
    closedir(dir);
    return ok;
}

static bool note_file(struct audit *a, struct folder *folder, const char *file)
{
    struct tally_slot *slot = slot_of(folder, file);
    if (!slot)
        return command_say(a->call, COMMAND_FAILED, "no memory for the files of %s", folder->path) < 0;
    slot->mark = MARK_ON_DISK;
    return true;
}

/* A file that came after the first listing has a new slot (MARK_NONE): its row may be newer than our reading. */
static bool note_orphan(struct audit *a, struct folder *folder, const char *file)
{
    char path[PATH_MAX + NAME_MAX + 2];
    struct tally_slot *slot = slot_of(folder, file);
    if (slot && slot->mark == MARK_ON_DISK) {
        snprintf(path, sizeof path, "%s/%s", folder->path, file);
        found(&a->orphan, path);
    }
    return true;
}

/* --- rows against files ----------------------------------------------------------------------------------- */

static bool note_lost(struct audit *a, const struct image_row *r, const char *path, bool is_missing)
{
    if (a->lost_count == a->lost_room) {
        size_t room = a->lost_room ? 2 * a->lost_room : 64;
        struct lost *more = realloc(a->lost, room * sizeof *more);
        if (!more)
            return false;
        a->lost = more;
        a->lost_room = room;
    }
    struct lost *l = &a->lost[a->lost_count];
    *l = (struct lost){.campaign = a->campaign, .task = r->task, .path = strdup(path), .is_missing = is_missing};
    a->lost_count += l->path != NULL;
    return l->path != NULL;
}

/* False: it is damaged. */
static bool check_content(struct audit *a, const char *path, const struct image_row *r)
{
    char sha256[65], why[PATH_MAX + 256], line[PATH_MAX + 512];
    uint64_t bytes = 0;
    struct stat info;
    if (stat(path, &info) == 0 && (uint64_t)info.st_size != r->bytes) {
        snprintf(line, sizeof line, "%s: %" PRIu64 " bytes, the row says %" PRIu64, path, (uint64_t)info.st_size, r->bytes);
        found(&a->damaged, line);
    } else if (!digest_file(path, sha256, &bytes, why, sizeof why)) {
        found(&a->damaged, why);
    } else if (bytes != r->bytes || strcmp(sha256, r->sha256) != 0) {
        snprintf(line, sizeof line, "%s: SHA-256 %s, the row says %s", path, sha256, r->sha256);
        found(&a->damaged, line);
    } else {
        return true;
    }
    return false;
}

static bool check_image(void *context, const struct image_row *r)
{
    struct audit *a = context;
    char path[PATH_MAX];
    const char *slash = strrchr(r->path, '/'), *file = slash ? slash + 1 : r->path;
    struct tally_slot *slot = slot_of(a->folder, file);
    if (slot)
        slot->mark = MARK_KNOWN;
    if (!a->is_checked)
        return slot != NULL;
    snprintf(path, sizeof path, "%s/%s", a->campaign->out_dir, file);
    bool is_missing = access(path, F_OK) != 0, ok = slot != NULL;
    if (is_missing || !check_content(a, path, r))
        ok = note_lost(a, r, path, is_missing) && ok;
    a->now.done++;
    if (a->has_bar)
        progress_update(&a->bar, &a->now);
    return ok;
}

static int check_rows(struct audit *a)
{
    struct pg_error why;
    for (int i = 0; i < a->campaign_count; i++) {
        a->campaign = &a->campaigns[i];
        a->folder = folder_of(a, a->campaign->out_dir);
        a->is_checked = is_audited(a, a->campaign);
        if (a->folder->is_wanted && !task_store_images(a->store, a->campaign->name, check_image, a, &why))
            return command_fault(a->call, &why);
    }
    return COMMAND_DONE;
}

/* Between commit and publishing a file is not there for a moment. */
static void look_again(struct audit *a)
{
    const int64_t until = clock_ms() + SECOND_LOOK_MS;
    for (size_t i = 0; i < a->lost_count; i++) {
        struct lost *l = &a->lost[i];
        if (!l->is_missing)
            continue;
        while (access(l->path, F_OK) != 0 && clock_ms() < until)
            clock_sleep_ms(50);
        l->is_over = access(l->path, F_OK) == 0;
        if (!l->is_over)
            found(&a->missing, l->path);
    }
}

/* What is staged while nothing runs was left behind; the janitor takes it away after a while. */
static bool note_staged(void *context, uint64_t task, uint64_t token, double age_s)
{
    struct audit *a = context;
    char line[PATH_MAX + 96];
    if (a->folder->running > 0 || age_s < STAGED_GRACE_S)
        return true;
    snprintf(line, sizeof line, "%s/.staging/%" PRIu64 "-%" PRIu64 ": %.0f s old", a->folder->path, task, token, age_s);
    found(&a->staged, line);
    return true;
}

static int check_files(struct audit *a)
{
    struct store_error ignored; /* a folder that is not there has nothing staged; its images were reported */
    for (int i = 0; i < a->folder_count; i++)
        if (a->folders[i].is_wanted && !each_file(a, &a->folders[i], note_file))
            return COMMAND_FAILED;
    int code = check_rows(a);
    if (code != COMMAND_DONE)
        return code;
    for (int i = 0; i < a->folder_count; i++) {
        a->folder = &a->folders[i];
        if (!a->folder->is_wanted)
            continue;
        if (!each_file(a, a->folder, note_orphan))
            return COMMAND_FAILED;
        store_dir_staged(a->folder->path, note_staged, a, &ignored);
    }
    look_again(a);
    return COMMAND_DONE;
}

/* --- repairing ---------------------------------------------------------------------------------------------- */

static void leave(struct audit *a, struct lost *l, const char *why)
{
    l->is_over = true;
    command_say(a->call, COMMAND_FAILED, "%s: not rendered again: %s", l->path, why);
}

/* A staged file of the task gets its name from the worker or the janitor. */
static bool note_on_its_way(void *context, uint64_t task, uint64_t token, double age_s)
{
    struct audit *a = context;
    (void)token;
    (void)age_s;
    for (size_t i = 0; i < a->lost_count; i++)
        if (a->lost[i].campaign == a->campaign && a->lost[i].task == task && !a->lost[i].is_over)
            leave(a, &a->lost[i], "its file is staged and gets its name within a minute; if another file has it, move that away");
    return true;
}

/* FILE.damaged, or where that is taken FILE.damaged-2, -3 ..: what was damaged before is kept as well. 0 or an errno. */
static int rename_aside(const char *path, char ret_aside[PATH_MAX + 32])
{
    int error = EEXIST;
    for (int i = 1; error == EEXIST && i < INT_MAX; i++) {
        snprintf(ret_aside, PATH_MAX + 32, i == 1 ? "%s.damaged" : "%s.damaged-%d", path, i);
        error = store_dir_move(path, ret_aside);
    }
    return error;
}

/* What cannot be read now may be whole: a disk, not the file, is then to be mended. */
static void move_aside(struct audit *a, struct lost *l)
{
    char aside[PATH_MAX + 32], why[2 * PATH_MAX + 256], sha256[65];
    uint64_t bytes;
    if (!digest_file(l->path, sha256, &bytes, why, sizeof why)) {
        leave(a, l, why);
        return;
    }
    int error = rename_aside(l->path, aside);
    if (!error)
        return;
    snprintf(why, sizeof why, "it cannot be renamed to %s: %s", aside, strerror(error));
    leave(a, l, why);
}

static void leave_cancelled(struct audit *a)
{
    char why[512];
    snprintf(why, sizeof why, "campaign '%s' is cancelled; 'kiln retry %s' takes it up again, then audit it once more", a->campaign->name,
             a->campaign->name);
    for (size_t i = 0; i < a->lost_count; i++)
        if (a->lost[i].campaign == a->campaign && !a->lost[i].is_over)
            leave(a, &a->lost[i], why);
}

/* A folder that is gone is most often a disk that is not mounted: then everything would be rendered again. */
static void prepare_repair(struct audit *a)
{
    struct store_error ignored;
    struct stat info;
    bool is_there = stat(a->campaign->out_dir, &info) == 0 && S_ISDIR(info.st_mode);
    if (is_there)
        store_dir_staged(a->campaign->out_dir, note_on_its_way, a, &ignored);
    for (size_t i = 0; i < a->lost_count; i++) {
        struct lost *l = &a->lost[i];
        if (l->campaign != a->campaign || l->is_over)
            continue;
        if (!is_there)
            leave(a, l, "its folder is not there; mount its disk, or make the folder to have all of it rendered again");
        else if (!l->is_missing)
            move_aside(a, l);
        else if (access(l->path, F_OK) != 0 && errno != ENOENT)
            leave(a, l, strerror(errno));
    }
}

static int repair_campaign(struct audit *a, uint64_t *tasks, int64_t *count)
{
    struct pg_error why;
    size_t task_count = 0;
    int64_t moved = 0;
    if (strcmp(a->campaign->state, "cancelled") == 0)
        leave_cancelled(a);
    else
        prepare_repair(a);
    for (size_t i = 0; i < a->lost_count; i++)
        if (a->lost[i].campaign == a->campaign && !a->lost[i].is_over)
            tasks[task_count++] = a->lost[i].task;
    if (task_count && !task_store_lost(a->store, a->campaign->name, tasks, task_count, &moved, &why))
        return command_fault(a->call, &why);
    *count += moved;
    return COMMAND_DONE;
}

static int repair(struct audit *a)
{
    int64_t count = 0;
    int code = COMMAND_DONE;
    uint64_t *tasks = malloc((a->lost_count + 1) * sizeof *tasks);
    if (!tasks)
        return command_say(a->call, COMMAND_FAILED, "no memory for %zu images", a->lost_count);
    for (int i = 0; i < a->campaign_count && code == COMMAND_DONE; i++) {
        a->campaign = &a->campaigns[i];
        code = repair_campaign(a, tasks, &count);
    }
    free(tasks);
    if (a->json)
        printf("{\"rendered_again\":%" PRId64 "}\n", count);
    else
        printf("%" PRId64 " image%s rendered again\n", count, count == 1 ? " is" : "s are");
    return code;
}

/* --- the command ------------------------------------------------------------------------------------------ */

static bool sql_check(void *context, const char *check, int64_t violations)
{
    print_finding(context, check, violations, "");
    return true;
}

static int steps(struct audit *a)
{
    struct pg_error why;
    int code = command_store(a->call, &a->store);
    if (code == COMMAND_DONE)
        code = read_campaigns(a);
    if (code != COMMAND_DONE)
        return code;
    if (!task_store_audit(a->store, a->name, sql_check, a, &why))
        return command_fault(a->call, &why);
    a->has_bar = isatty(STDERR_FILENO);
    if (a->has_bar)
        progress_begin(&a->bar, stderr, "audit", "images");
    code = check_files(a);
    if (a->has_bar)
        progress_clear(&a->bar);
    if (code != COMMAND_DONE)
        return code;
    struct finding *const findings[] = {&a->missing, &a->damaged, &a->orphan, &a->staged};
    for (int i = 0; i < 4; i++)
        print_finding(a, findings[i]->check, findings[i]->violations, findings[i]->examples.length ? findings[i]->examples.data : "");
    if (!a->json && a->violations == 0)
        printf("clean\n");
    else if (!a->json)
        printf("%" PRId64 " violation%s\n", a->violations, a->violations == 1 ? "" : "s");
    if (a->repair)
        code = repair(a);
    return code == COMMAND_DONE && a->violations ? COMMAND_FAILED : code;
}

static void done(struct audit *a)
{
    for (size_t i = 0; i < a->lost_count; i++)
        free(a->lost[i].path);
    free(a->lost);
    for (int i = 0; i < a->folder_count; i++)
        tally_done(&a->folders[i].files);
    json_text_done(&a->missing.examples);
    json_text_done(&a->damaged.examples);
    json_text_done(&a->orphan.examples);
    json_text_done(&a->staged.examples);
    task_store_campaigns_free(a->campaigns, a->campaign_count);
    free(a->folders);
    task_store_close(a->store);
}

static int audit_run(struct command_call *call)
{
    struct audit a = {.call = call, .now = PROGRESS_UNKNOWN, .missing.check = "image_file_missing",
                      .damaged.check = "image_file_damaged", .orphan.check = "file_without_row", .staged.check = "stale_staged_file"};
    const struct command_option options[] = {{"json", COMMAND_FLAG, &a.json, 0, 0}, {"repair", COMMAND_FLAG, &a.repair, 0, 0}};
    int word_count;
    if (!command_parse(call, options, sizeof options / sizeof *options, &a.name, 0, 1, &word_count))
        return command_code(call);
    a.now.total = 0;
    int code = steps(&a);
    done(&a);
    return code;
}

const struct command audit_command = {"audit", "[NAME] [--repair] [--json]", "see whether rows and files agree", usage, audit_run};
