/* home.c - finding, making and describing the folder kiln lives in.
 *
 * The folder's path ends up in socket addresses, database URIs and command lines of children, so what any of them
 * would not take is refused here, once. kiln.json is written under another name and renamed: a reader finds the old one or
 * the new one. */
#include "home.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "home_dir.h"

/* --- where it is -------------------------------------------------------------------------------------------- */

/* The path without links, as far as it exists: two spellings of one home must not look like two homes. */
static bool resolve(const char *path, char ret[PATH_MAX])
{
    char head[PATH_MAX], rest[PATH_MAX] = "";
    snprintf(head, sizeof head, "%s", path);
    while (!realpath(head, ret)) {
        char *slash = strrchr(head, '/'), joined[PATH_MAX];
        if (errno != ENOENT || !slash)
            return false;
        int used = snprintf(joined, sizeof joined, "%s%s%s", slash + 1, slash[1] && *rest ? "/" : "", rest);
        if (used < 0 || (size_t)used >= sizeof joined)
            return false;
        memcpy(rest, joined, (size_t)used + 1);
        slash[slash == head] = 0; /* "/x" leaves "/" */
        if (slash == head && !*rest)
            return false;
    }
    size_t length = strlen(ret);
    int used = !*rest ? 0 : snprintf(ret + length, PATH_MAX - length, "%s%s", length > 1 ? "/" : "", rest);
    return used >= 0 && length + (size_t)used < PATH_MAX;
}

bool home_open(struct home *ret, const char *option, char *why, size_t why_bytes)
{
    char named[PATH_MAX], absolute[PATH_MAX], cwd[PATH_MAX], dir[PATH_MAX];
    if (option && !*option) {
        snprintf(why, why_bytes, "--home is empty; accepted is a folder");
        return false;
    }
    if (option ? (size_t)snprintf(named, sizeof named, "%s", option) >= sizeof named : !home_dir_default(named, sizeof named)) {
        snprintf(why, why_bytes, option ? "--home is longer than a path may be" : "no home for kiln: set KILN_HOME or give --home DIR");
        return false;
    }
    int used = named[0] == '/' ? snprintf(absolute, sizeof absolute, "%s", named)
               : getcwd(cwd, sizeof cwd) ? snprintf(absolute, sizeof absolute, "%s/%s", cwd, named) : -1;
    errno = ENAMETOOLONG;
    if (used < 0 || (size_t)used >= sizeof absolute || !resolve(absolute, dir)) {
        snprintf(why, why_bytes, "home '%.200s': %s", named, strerror(errno));
        return false;
    }
    for (const char *c = dir; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f || *c == ',') { /* libpq reads a comma as two hosts */
            snprintf(why, why_bytes, "home '%.200s': character 0x%02x at position %td cannot be in the path of a home", dir,
                     (unsigned char)*c, c - dir + 1);
            return false;
        }
    if (strlen(dir) > HOME_DIR_MAX) {
        snprintf(why, why_bytes, "home '%.200s' has %zu bytes; accepted are at most %d, because sockets live in it", dir, strlen(dir),
                 HOME_DIR_MAX);
        return false;
    }
    memcpy(ret->dir, dir, strlen(dir) + 1);
    return true;
}

void home_path(const struct home *home, char *ret, size_t bytes, const char *relative)
{
    snprintf(ret, bytes, "%s/%s", home->dir, relative);
}

/* --- making it ---------------------------------------------------------------------------------------------- */

static bool fail_path(const char *path, char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
    return false;
}

/* mkdir -p of the home's parents: a home is a place of kiln's own, unlike a folder for images. */
static bool make_parents(const char *dir, char *why, size_t why_bytes)
{
    char path[HOME_DIR_MAX + 1];
    for (const char *slash = strchr(dir + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(path, sizeof path, "%.*s", (int)(slash - dir), dir);
        if (mkdir(path, 0755) != 0 && errno != EEXIST)
            return fail_path(path, why, why_bytes);
    }
    return true;
}

static const char *user_name(uid_t uid, char ret[64])
{
    const struct passwd *user = getpwuid(uid);
    if (user)
        snprintf(ret, 64, "%s", user->pw_name);
    else
        snprintf(ret, 64, "number %ld", (long)uid);
    return ret;
}

static bool check_home(const struct home *home, char *why, size_t why_bytes)
{
    struct stat info;
    char owner[64], me[64];
    if (stat(home->dir, &info) != 0)
        return fail_path(home->dir, why, why_bytes);
    if (!S_ISDIR(info.st_mode)) {
        snprintf(why, why_bytes, "%s is not a folder", home->dir);
        return false;
    }
    if (info.st_uid != geteuid()) {
        user_name(info.st_uid, owner);
        snprintf(why, why_bytes, "%s belongs to user %s, and this is user %s: run kiln as %s, or take another home", home->dir, owner,
                 user_name(geteuid(), me), owner);
        return false;
    }
    if (access(home->dir, W_OK | X_OK) != 0) {
        snprintf(why, why_bytes, "%s cannot be written to: %s", home->dir, strerror(errno));
        return false;
    }
    return true;
}

/* A folder with exactly this owner and mode, whatever was there before. */
static bool make_folder(const struct home *home, const char *name, uid_t uid, gid_t gid, mode_t mode, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX];
    struct stat info;
    home_path(home, path, sizeof path, name);
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return fail_path(path, why, why_bytes);
    if (stat(path, &info) != 0)
        return fail_path(path, why, why_bytes);
    if (!S_ISDIR(info.st_mode)) {
        snprintf(why, why_bytes, "%s is not a folder", path);
        return false;
    }
    if (uid == (uid_t)-1)
        uid = geteuid();
    if ((info.st_uid != uid || (gid != (gid_t)-1 && info.st_gid != gid)) && chown(path, uid, gid) != 0)
        return fail_path(path, why, why_bytes);
    if ((info.st_mode & 07777) != mode && chmod(path, mode) != 0)
        return fail_path(path, why, why_bytes);
    return true;
}

bool home_create(const struct home *home, unsigned postgres_uid, unsigned postgres_gid, char *why, size_t why_bytes)
{
    const gid_t postgres_group = postgres_gid == (unsigned)-1 ? (gid_t)-1 : (gid_t)postgres_gid;
    /* Sticky: the server may put its socket into run/, and not take away what is ours. */
    const mode_t run_mode = postgres_group == (gid_t)-1 ? 0700 : 01770;
    if (!make_parents(home->dir, why, why_bytes))
        return false;
    if (mkdir(home->dir, 0755) != 0 && errno != EEXIST)
        return fail_path(home->dir, why, why_bytes);
    return check_home(home, why, why_bytes) &&
           make_folder(home, "postgres", (uid_t)postgres_uid, postgres_group, 0700, why, why_bytes) &&
           make_folder(home, "run", (uid_t)-1, postgres_group, run_mode, why, why_bytes) &&
           make_folder(home, "log", (uid_t)-1, (gid_t)-1, 0755, why, why_bytes) &&
           make_folder(home, "spool", (uid_t)-1, (gid_t)-1, 0700, why, why_bytes);
}

/* --- the database ------------------------------------------------------------------------------------------- */

void home_private_uri(const struct home *home, char *ret, size_t bytes)
{
    size_t used = (size_t)snprintf(ret, bytes, "postgresql:///kiln?host=");
    for (const char *c = home->dir; *c && used + 4 < bytes; c++) {
        bool is_plain = strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-~", *c) != NULL;
        used += (size_t)snprintf(ret + used, bytes - used, is_plain ? "%c" : "%%%02X", (unsigned char)*c);
    }
    snprintf(ret + used, bytes - used, "/run&port=5432&user=kiln");
}

const char *const home_database_variables[HOME_DATABASE_VARIABLES] = {"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE"};

bool home_environment_names_database(void)
{
    for (int i = 0; i < HOME_DATABASE_VARIABLES; i++) {
        const char *value = getenv(home_database_variables[i]);
        if (value && *value)
            return true;
    }
    return false;
}

bool home_database(const struct home *home, const char *option, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    bool is_found = false, ok = false;
    if (option && (!*option || strlen(option) >= bytes || strlen(option) >= HOME_PATH_MAX)) {
        snprintf(why, why_bytes, "--database: accepted is a URI of 1 to %d bytes", HOME_PATH_MAX - 1);
        return false;
    }
    if (option || home_environment_names_database()) {
        snprintf(ret, bytes, "%s", option ? option : "");
        return true;
    }
    struct home_config *config = malloc(sizeof *config);
    if (!config) {
        snprintf(why, why_bytes, "out of memory");
        return false;
    }
    if (!home_config_read(home, config, &is_found, why, why_bytes))
        goto done;
    if (is_found && !*config->database) {
        snprintf(why, why_bytes, "the last `kiln up` on %s used a database that libpq's environment named (PGHOST, PGSERVICE, ...), "
                 "which is not set here: set it, or give --database URI", home->dir);
        goto done;
    }
    if (is_found)
        snprintf(ret, bytes, "%s", config->database);
    else
        home_private_uri(home, ret, bytes);
    ok = true;
done:
    free(config);
    return ok;
}

/* --- kiln.json ---------------------------------------------------------------------------------------------- */

/* Reads members one by one; the first that is missing or wrong is remembered. */
struct members { const json_t *object; const char *bad; };

static void read_text(struct members *m, const char *name, char *ret, size_t bytes)
{
    const char *text = json_string_value(json_object_get(m->object, name));
    if (!text || strlen(text) >= bytes)
        m->bad = m->bad ? m->bad : name;
    else
        memcpy(ret, text, strlen(text) + 1);
}

static int read_count(struct members *m, const char *name, int max)
{
    const json_t *value = json_object_get(m->object, name);
    if (json_is_integer(value) && json_integer_value(value) >= 0 && json_integer_value(value) <= max)
        return (int)json_integer_value(value);
    m->bad = m->bad ? m->bad : name;
    return 0;
}

static const char *read_models(const json_t *models, struct home_config *ret)
{
    if (!json_is_array(models) || json_array_size(models) > HOME_MODELS_MAX)
        return "models";
    for (size_t i = 0; i < json_array_size(models); i++) {
        struct members m = {.object = json_array_get(models, i)};
        read_text(&m, "name", ret->models[i].name, sizeof ret->models[i].name);
        read_text(&m, "dir", ret->models[i].dir, sizeof ret->models[i].dir);
        if (m.bad)
            return m.bad;
    }
    ret->model_count = (int)json_array_size(models);
    return NULL;
}

static const char *read_config(const json_t *root, struct home_config *ret)
{
    struct members m = {.object = root};
    memset(ret, 0, sizeof *ret);
    read_text(&m, "endpoint", ret->endpoint, sizeof ret->endpoint);
    read_text(&m, "database", ret->database, sizeof ret->database);
    read_text(&m, "device", ret->device, sizeof ret->device);
    read_text(&m, "precision", ret->precision, sizeof ret->precision);
    ret->workers = read_count(&m, "workers", INT_MAX);
    ret->threads = read_count(&m, "threads", INT_MAX);
    ret->batch = read_count(&m, "batch", INT_MAX);
    return m.bad ? m.bad : read_models(json_object_get(root, "models"), ret);
}

bool home_config_read(const struct home *home, struct home_config *ret, bool *ret_found, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX];
    json_error_t fault;
    *ret_found = false;
    home_path(home, path, sizeof path, "run/kiln.json");
    FILE *file = fopen(path, "re");
    if (!file && (errno == ENOENT || errno == ENOTDIR))
        return true;
    if (!file)
        return fail_path(path, why, why_bytes);
    json_t *root = json_loadf(file, JSON_REJECT_DUPLICATES, &fault);
    fclose(file);
    const char *bad = root ? read_config(root, ret) : NULL;
    if (!root)
        snprintf(why, why_bytes, "%s is damaged (line %d: %s): remove it, and name models and database to `kiln up` again", path,
                 fault.line, fault.text);
    else if (bad)
        snprintf(why, why_bytes, "%s is damaged ('%s' is missing or wrong): remove it, and name models and database to `kiln up` again",
                 path, bad);
    *ret_found = root && !bad;
    json_decref(root);
    return *ret_found;
}

static json_t *config_json(const struct home_config *c)
{
    json_t *models = json_array();
    for (int i = 0; i < c->model_count; i++)
        if (json_array_append_new(models, json_pack("{s:s,s:s}", "name", c->models[i].name, "dir", c->models[i].dir)) != 0) {
            json_decref(models);
            return NULL;
        }
    return json_pack("{s:s,s:s,s:s,s:s,s:i,s:i,s:i,s:o}", "endpoint", c->endpoint, "database", c->database, "device", c->device,
                     "precision", c->precision, "workers", c->workers, "threads", c->threads, "batch", c->batch, "models", models);
}

static bool write_file(const char *path, const json_t *root)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600); /* a URI may hold a password */
    if (fd < 0)
        return false;
    bool ok = json_dumpfd(root, fd, JSON_INDENT(2)) == 0 && write(fd, "\n", 1) == 1 && fsync(fd) == 0;
    return close(fd) == 0 && ok;
}

bool home_config_write(const struct home *home, const struct home_config *config, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX], draft[HOME_PATH_MAX];
    home_path(home, path, sizeof path, "run/kiln.json");
    home_path(home, draft, sizeof draft, "run/kiln.json.new");
    json_t *root = config_json(config);
    if (!root) {
        snprintf(why, why_bytes, "%s: names and paths must be UTF-8", path);
        return false;
    }
    bool ok = write_file(draft, root) && rename(draft, path) == 0;
    if (!ok)
        fail_path(path, why, why_bytes);
    json_decref(root);
    return ok;
}

bool home_models(const struct home *home, struct home_model **ret, int *ret_count, char *why, size_t why_bytes)
{
    struct home_config *config = malloc(sizeof *config);
    struct home_model *models = NULL;
    bool is_found = false, ok = config && home_config_read(home, config, &is_found, why, why_bytes);
    if (!config)
        snprintf(why, why_bytes, "out of memory");
    int count = ok && is_found ? config->model_count : 0;
    if (count > 0) {
        models = malloc((size_t)count * sizeof *models);
        ok = models != NULL;
        if (ok)
            memcpy(models, config->models, (size_t)count * sizeof *models);
        else
            snprintf(why, why_bytes, "out of memory");
    }
    free(config);
    if (!ok)
        return false;
    *ret = models;
    *ret_count = count;
    return true;
}

/* --- programs of this build --------------------------------------------------------------------------------- */

static bool is_program(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISREG(info.st_mode) && access(path, X_OK) == 0;
}

static bool find_in_path(const char *name, char *ret, size_t bytes)
{
    const char *path = getenv("PATH");
    while (path && *path) {
        size_t length = strcspn(path, ":");
        int used = snprintf(ret, bytes, "%.*s/%s", (int)length, path, name);
        if (length > 0 && used > 0 && (size_t)used < bytes && is_program(ret))
            return true;
        path += length + (path[length] == ':');
    }
    return false;
}

bool home_tool(const char *name, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    char self[PATH_MAX], found[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    self[length > 0 ? length : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    bool ok = slash && snprintf(found, sizeof found, "%s/%s", self, name) < (int)sizeof found && is_program(found);
    if (!ok)
        ok = find_in_path(name, found, sizeof found);
    if (ok && strlen(found) < bytes) {
        memcpy(ret, found, strlen(found) + 1);
        return true;
    }
    snprintf(why, why_bytes, "the program %s was not found, neither in %s nor in PATH", name, slash ? self : "this program's folder");
    return false;
}
