/* home.h - where kiln lives: one folder with everything a farm on this machine needs.
 *
 *   HOME/postgres/          data of the private PostgreSQL (owned by the user postgres when kiln runs as root)
 *   HOME/run/               pid files, sockets, kiln.json; private to the user (and postgres)
 *   HOME/log/               kiln.log coordinator.log worker-N.log postgres.log
 *   HOME/spool/worker-N/    results a worker could not hand over yet
 *   HOME/images/CAMPAIGN/   unless submit says --out
 *
 * HOME is --home, else what home_dir.h says (KILN_HOME, /var/lib/kiln for root, ...). Unix sockets limit
 * paths to 107 bytes, so a home may be HOME_DIR_MAX bytes long; a longer one is refused. */
#ifndef KILN_HOME_H
#define KILN_HOME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOME_PATH_MAX 4096
#define HOME_SOCKET_MAX 107 /* bytes of sun_path without its end */
#define HOME_DIR_MAX (HOME_SOCKET_MAX - 18) /* "/run/.s.PGSQL.5432" */
#define HOME_MODELS_MAX 64
#define HOME_NAME_MAX 128

struct home { char dir[HOME_DIR_MAX + 1]; }; /* absolute */

/* home_open finds out where the home is (option: --home or NULL). It creates nothing. */
bool home_open(struct home *ret, const char *option, char *why, size_t why_bytes);

/* home_path writes HOME/relative into ret (HOME_PATH_MAX bytes is always enough for relative up to 255). */
void home_path(const struct home *home, char *ret, size_t bytes, const char *relative);

/* home_create makes the folders with their modes. postgres_uid and _gid: who must be able to put a socket into run/
 * and reach postgres/; (unsigned)-1 when that is the caller. */
bool home_create(const struct home *home, unsigned postgres_uid, unsigned postgres_gid, char *why, size_t why_bytes);

/* home_private_uri: the private PostgreSQL, by its socket in run/. */
void home_private_uri(const struct home *home, char *ret, size_t bytes);

/* home_database says which database the commands of this home use: option (--database) wins, then libpq's
 * environment (*ret empty), then what `kiln up` wrote to kiln.json, then the private one. False when
 * `kiln up` used an environment that is not here. HOME_PATH_MAX bytes. */
bool home_database(const struct home *home, const char *option, char *ret, size_t bytes, char *why, size_t why_bytes);
#define HOME_DATABASE_VARIABLES 5
extern const char *const home_database_variables[HOME_DATABASE_VARIABLES]; /* of libpq, that say which database: PGHOST, ... */
bool home_environment_names_database(void);                               /* one of them is set */

/* run/kiln.json: what the last `kiln up` was told. It stays after `kiln down`. */
struct home_model { char name[HOME_NAME_MAX + 1], dir[HOME_PATH_MAX]; };
struct home_config {
    char endpoint[HOME_PATH_MAX];  /* where workers connect */
    char database[HOME_PATH_MAX];  /* URI; "" means libpq's environment of that time */
    char device[64], precision[16];
    int workers, threads, batch;   /* threads, batch: 0 means the worker's own choice */
    int model_count;
    struct home_model models[HOME_MODELS_MAX];
};
/* home_config_read: false with *ret_found false when there is none yet, with why when it cannot be read. The struct
 * is large: keep it off the stack. */
bool home_config_read(const struct home *home, struct home_config *ret, bool *ret_found, char *why, size_t why_bytes);
bool home_config_write(const struct home *home, const struct home_config *config, char *why, size_t why_bytes);

/* home_models: the models of the last `kiln up`, malloc'ed (free it); count 0 and NULL when kiln was never up here. */
bool home_models(const struct home *home, struct home_model **ret, int *ret_count, char *why, size_t why_bytes);

/* home_tool finds a program of this build ("kiln-worker"): beside the running one, then in PATH. */
bool home_tool(const char *name, char *ret, size_t bytes, char *why, size_t why_bytes);

#endif
