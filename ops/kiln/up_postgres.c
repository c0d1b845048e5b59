/* up_postgres.c - kiln's own PostgreSQL: one socket in a private folder, no TCP, nothing lost by a crash.
 *
 * Settings are given on the command line, so that the data folder has no edited files and a newer kiln changes them.
 * The socket's folder is closed to others, therefore whoever reaches the socket is trusted. */
#include "up_postgres.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lifecycle.h"
#include "process.h"

#define ANSWER_MS 10000
#define BUFFERS_LEAST_MB 128
#define BUFFERS_MOST_MB 1024
#define DRAFT "postgres.new." /* and the process that makes it */

/* --- programs --------------------------------------------------------------------------------------------------- */

/* The major version of BIN/postgres, or 0. */
static int version_of(const char *bin)
{
    char initdb[1100], server[1100], text[512], why[2048];
    int major = 0;
    snprintf(initdb, sizeof initdb, "%s/initdb", bin);
    snprintf(server, sizeof server, "%s/postgres", bin);
    if (access(initdb, X_OK) != 0 || access(server, X_OK) != 0)
        return 0;
    char *const argv[] = {server, "--version", NULL};
    if (process_run(argv, NULL, NULL, text, sizeof text, why, sizeof why) != 0 || sscanf(text, "postgres (PostgreSQL) %d", &major) != 1)
        return 0;
    return major;
}

/* Takes bin if it is what is wanted: this major version, or (0) the newest. */
static void consider(struct up_postgres *p, const char *bin, int wanted, int *newest)
{
    int major = strlen(bin) < sizeof p->bin ? version_of(bin) : 0;
    if (major > *newest)
        *newest = major;
    if (major < UP_POSTGRES_LEAST || (wanted ? major != wanted : major <= p->major))
        return;
    p->major = major;
    snprintf(p->bin, sizeof p->bin, "%s", bin);
}

static void consider_each(struct up_postgres *p, const char *parent, const char *prefix, int wanted, int *newest)
{
    char bin[PATH_MAX];
    DIR *dir = opendir(parent);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (strncmp(e->d_name, prefix, strlen(prefix)) != 0 || e->d_name[0] == '.')
            continue;
        snprintf(bin, sizeof bin, "%s/%s/bin", parent, e->d_name);
        consider(p, bin, wanted, newest);
    }
    if (dir)
        closedir(dir);
}

static void consider_path(struct up_postgres *p, int wanted, int *newest)
{
    char program[PATH_MAX], real[PATH_MAX];
    const char *path = getenv("PATH");
    while (path && *path) {
        size_t length = strcspn(path, ":");
        snprintf(program, sizeof program, "%.*s/initdb", (int)length, path);
        if (length > 0 && realpath(program, real)) { /* a link in /usr/bin leads to its neighbours */
            *strrchr(real, '/') = 0;
            consider(p, real, wanted, newest);
        }
        path += length + (path[length] == ':');
    }
}

/* --- the data folder, as it is ------------------------------------------------------------------------------------ */

/* 0: there is none yet; -1 with why: there is something else. */
static int data_version(const struct home *home, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX];
    int major = 0;
    home_path(home, path, sizeof path, "postgres/PG_VERSION");
    FILE *f = fopen(path, "re");
    if (!f && (errno == ENOENT || errno == ENOTDIR))
        return 0;
    if (!f || fscanf(f, "%d", &major) != 1 || major <= 0) {
        snprintf(why, why_bytes, "%s: %s", path, f ? "is not PostgreSQL's version" : strerror(errno));
        major = -1;
    }
    if (f)
        fclose(f);
    return major;
}

static bool find_user(struct up_postgres *p, char *why, size_t why_bytes)
{
    p->user = (struct up_user){.uid = (unsigned)-1, .gid = (unsigned)-1};
    if (geteuid() != 0)
        return true;
    const struct passwd *user = getpwnam("postgres");
    if (!user) {
        snprintf(why, why_bytes, "PostgreSQL does not run as root, and there is no user 'postgres' to run it: install postgresql, "
                 "run kiln as another user, or give --database URI");
        return false;
    }
    snprintf(p->user.name, sizeof p->user.name, "%s", user->pw_name);
    p->user.uid = user->pw_uid;
    p->user.gid = user->pw_gid;
    return true;
}

bool up_postgres_find(struct up_postgres *ret, const struct home *home, char *why, size_t why_bytes)
{
    const char *named = getenv("KILN_PG_BIN");
    int newest = 0, wanted = data_version(home, why, why_bytes);
    *ret = (struct up_postgres){0};
    if (wanted < 0 || !find_user(ret, why, why_bytes))
        return false;
    if (named && *named) {
        consider(ret, named, wanted, &newest);
    } else {
        consider_each(ret, "/usr/lib/postgresql", "", wanted, &newest); /* Debian */
        consider_each(ret, "/usr", "pgsql-", wanted, &newest);          /* Red Hat */
        consider_path(ret, wanted, &newest);
    }
    if (ret->major)
        return true;
    if (wanted && wanted < UP_POSTGRES_LEAST)
        snprintf(why, why_bytes, "%s/postgres is a data folder of PostgreSQL %d; %d or newer is needed: move the data with pg_upgrade",
                 home->dir, wanted, UP_POSTGRES_LEAST);
    else if (wanted && newest)
        snprintf(why, why_bytes, "%s/postgres is a data folder of PostgreSQL %d, found is PostgreSQL %d: install postgresql-%d, or move "
                 "the data with pg_upgrade", home->dir, wanted, newest, wanted);
    else if (newest)
        snprintf(why, why_bytes, "found is PostgreSQL %d; %d or newer is needed: install postgresql-%d, or give --database URI", newest,
                 UP_POSTGRES_LEAST, UP_POSTGRES_LEAST);
    else
        snprintf(why, why_bytes, "no PostgreSQL server was found%s%s: install postgresql-%d, or give --database URI",
                 named && *named ? " in KILN_PG_BIN=" : "", named ? named : "", wanted ? wanted : UP_POSTGRES_LEAST);
    return false;
}

/* --- the first start ------------------------------------------------------------------------------------------------ */

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *walk)
{
    (void)info, (void)type, (void)walk;
    return remove(path);
}

static bool is_empty(const char *path)
{
    bool empty = true;
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            empty = false;
    if (dir)
        closedir(dir);
    return empty;
}

struct becoming { const struct up_user *user; pid_t parent; };

static void become(void *context)
{
    const struct becoming *b = context;
    if (!up_child_become(b->user, SIGTERM, b->parent)) {
        dprintf(STDERR_FILENO, "cannot become user %s: %s\n", b->user->name, strerror(errno));
        _exit(LIFECYCLE_REFUSED);
    }
}

/* The first folder on the way to path that others may not enter. */
static void closed_folder(const char *path, char *ret, size_t bytes)
{
    struct stat info;
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(ret, bytes, "%.*s", (int)(slash - path), path);
        if (stat(ret, &info) == 0 && !(info.st_mode & S_IXOTH))
            return;
    }
    snprintf(ret, bytes, "%s", path);
}

/* Asked as the server's user, because groups and ACLs have their say too. */
static bool check_reach(const struct up_postgres *p, const char *dir, char *why, size_t why_bytes)
{
    char text[512], closed[HOME_PATH_MAX];
    struct becoming b = {&p->user, getpid()};
    char *const argv[] = {"/usr/bin/test", "-w", (char *)dir, NULL};
    if (!*p->user.name || process_run(argv, become, &b, text, sizeof text, why, why_bytes) == 0)
        return true;
    closed_folder(dir, closed, sizeof closed);
    snprintf(why, why_bytes, "user %s, who runs PostgreSQL, cannot write to %s (%s is closed to others): take a home that it can reach, "
             "as /var/lib/kiln", p->user.name, dir, closed);
    return false;
}

/* initdb ends with "removing contents of ...": the line that says why stands before. */
static const char *cause_of(char *text)
{
    static const char *const marks[] = {"FATAL: ", "PANIC: ", "error: "};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        char *at = strstr(text, marks[i]);
        if (at) {
            at[strcspn(at, "\r\n")] = 0;
            return at;
        }
    }
    return process_last_line(text);
}

static bool run_initdb(const struct up_postgres *p, const char *dir, char *why, size_t why_bytes)
{
    char program[1100], text[8192];
    struct becoming b = {&p->user, getpid()};
    snprintf(program, sizeof program, "%s/initdb", p->bin);
    char *const argv[] = {program, "-D", (char *)dir, "-A", "trust", "-U", "kiln", "-E", "UTF8", "--locale=C", "--data-checksums", NULL};
    int status = process_run(argv, become, &b, text, sizeof text, why, why_bytes);
    if (status == 0)
        return true;
    if (status != -1)
        snprintf(why, why_bytes, "%s did not make %s: %s", program, dir, cause_of(text));
    return false;
}

static void sync_folder(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

/* What an earlier start left half-made. Its initdb may still be ending, which throws its own folder away: that is why each start
 * has a name of its own. */
static void remove_drafts(const struct home *home)
{
    char path[HOME_PATH_MAX];
    DIR *dir = opendir(home->dir);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (strncmp(e->d_name, DRAFT, strlen(DRAFT)) == 0 && strlen(home->dir) + strlen(e->d_name) + 2 < sizeof path) {
            home_path(home, path, sizeof path, e->d_name);
            nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
        }
    if (dir)
        closedir(dir);
}

/* Made under another name: a folder that was killed half-way is thrown away and made again. */
bool up_postgres_prepare(const struct up_postgres *p, const struct home *home, char *why, size_t why_bytes)
{
    char dir[HOME_PATH_MAX], name[64], draft[HOME_PATH_MAX];
    snprintf(name, sizeof name, DRAFT "%ld", (long)getpid());
    home_path(home, dir, sizeof dir, "postgres");
    home_path(home, draft, sizeof draft, name);
    if (!check_reach(p, dir, why, why_bytes))
        return false;
    remove_drafts(home);
    if (data_version(home, why, why_bytes) > 0)
        return true;
    if (!is_empty(dir)) {
        snprintf(why, why_bytes, "%s is neither empty nor a data folder of PostgreSQL: move it away", dir);
        return false;
    }
    bool ok = mkdir(draft, 0700) == 0 && (!*p->user.name || chown(draft, p->user.uid, p->user.gid) == 0);
    if (!ok) {
        snprintf(why, why_bytes, "%s: %s", draft, strerror(errno));
        return false;
    }
    if (!run_initdb(p, draft, why, why_bytes))
        return false;
    if (rename(draft, dir) != 0) {
        snprintf(why, why_bytes, "%s: %s", dir, strerror(errno));
        return false;
    }
    sync_folder(home->dir);
    return true;
}

/* --- the server ------------------------------------------------------------------------------------------------------- */

static long shared_buffers_mb(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
    long mb = pages > 0 && page > 0 ? (long)((double)pages * (double)page / (1 << 20) / 32) : BUFFERS_LEAST_MB;
    return mb < BUFFERS_LEAST_MB ? BUFFERS_LEAST_MB : mb > BUFFERS_MOST_MB ? BUFFERS_MOST_MB : mb;
}

/* A list of folders for the server: quoted, because a home's name may hold blanks. */
static void quoted(char *ret, size_t bytes, const struct home *home)
{
    size_t used = 0;
    ret[used++] = '"';
    for (const char *c = home->dir; *c && used + 8 < bytes; c++) {
        if (*c == '"')
            ret[used++] = '"';
        ret[used++] = *c;
    }
    snprintf(ret + used, bytes - used, "/run\"");
}

void up_postgres_command(const struct up_postgres *p, const struct home *home, struct up_child *ret)
{
    static const char *const settings[] = {
        "listen_addresses=",          /* no TCP */
        "port=5432",                  /* part of the socket's name */
        "unix_socket_permissions=0700",
        "fsync=on", "synchronous_commit=on", "full_page_writes=on",
        "max_connections=100",
        "max_wal_size=4GB", "checkpoint_timeout=5min", "wal_compression=on",
        "work_mem=16MB", "maintenance_work_mem=256MB",
        "random_page_cost=1.1",       /* SSD */
        "autovacuum_naptime=10s",     /* the hot table turns over in minutes */
        "log_line_prefix=%m [%p] %a ",
        "logging_collector=off",
    };
    char sockets[2 * HOME_DIR_MAX + 16];
    quoted(sockets, sizeof sockets, home);
    up_child_init(ret, home, "postgres", SIGINT); /* fast: connections are ended, a checkpoint is written */
    up_child_run_as(ret, &p->user);
    up_child_arg(ret, "%s/postgres", p->bin);
    up_child_arg(ret, "-D");
    up_child_arg(ret, "%s/postgres", home->dir);
    up_child_arg(ret, "-c");
    up_child_arg(ret, "unix_socket_directories=%s", sockets);
    up_child_arg(ret, "-c");
    up_child_arg(ret, "shared_buffers=%ldMB", shared_buffers_mb());
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        up_child_arg(ret, "-c");
        up_child_arg(ret, "%s", settings[i]);
    }
}

bool up_postgres_ready(const struct home *home, struct pg_error *why)
{
    static const char database[] = "///kiln?";
    char uri[HOME_PATH_MAX], maintenance[HOME_PATH_MAX + 16];
    struct pg *pg = NULL;
    struct pg_result *rows = NULL;
    home_private_uri(home, uri, sizeof uri);
    const char *name = strstr(uri, database);
    snprintf(maintenance, sizeof maintenance, "%.*s///postgres?%s", (int)(name - uri), uri, name + strlen(database));
    bool ok = pg_open(&pg, maintenance, ANSWER_MS, why) &&
              pg_run(pg, "select 1 from pg_database where datname = 'kiln'", NULL, &rows, why) &&
              (pg_row_count(rows) > 0 || pg_script(pg, "create database kiln", why));
    pg_result_free(rows);
    pg_close(pg);
    return ok;
}
