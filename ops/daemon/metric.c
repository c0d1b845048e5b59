/* metric.c - a registry of series and the small web server that shows it (libmicrohttpd, loopback only).
 *
 * Series live as long as the process. Counters and gauges are one atomic double; a histogram has a lock. The page
 * lists families in order of first registration, with HELP and TYPE once per family. */
#include "metric.h"

#include <arpa/inet.h>
#include <assert.h>
#include <math.h>
#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { COUNTER, GAUGE, HISTOGRAM };

#define BOUNDS_MAX 32

struct metric {
    enum kind kind;
    const char *name, *help, *labels;
    _Atomic double value;
    pthread_mutex_t lock; /* histograms */
    double bounds[BOUNDS_MAX];
    uint64_t buckets[BOUNDS_MAX + 1];
    int bound_count;
    double sum;
    struct metric *next;
};

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct metric *first, **last = &first;
static struct metric lost; /* what a registration without memory returns: counts into nothing */

static struct {
    struct MHD_Daemon *daemon;
    bool (*ready)(void *);
    void *context;
} server;

static bool is_same_text(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

/* A name is written in the source: a wrong one would make the whole page unreadable to Prometheus. */
static bool is_name(const char *name)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_:0123456789";
    return *name && strspn(name, letters) == strlen(name) && (*name < '0' || *name > '9');
}

static struct metric *add(enum kind kind, const char *name, const char *help, const char *labels)
{
    assert(is_name(name));
    pthread_mutex_lock(&registry_lock);
    struct metric *m = first;
    while (m && !(strcmp(m->name, name) == 0 && is_same_text(m->labels, labels)))
        m = m->next;
    if (!m && (m = calloc(1, sizeof *m))) {
        m->kind = kind, m->name = name, m->help = help, m->labels = labels ? strdup(labels) : NULL;
        pthread_mutex_init(&m->lock, NULL);
        *last = m;
        last = &m->next;
    }
    pthread_mutex_unlock(&registry_lock);
    assert(!m || m->kind == kind);
    return m ? m : &lost;
}

const char *metric_label(char *ret, unsigned long ret_bytes, const char *name, const char *value)
{
    snprintf(ret, ret_bytes, "%s=\"%s\"", name, value);
    return ret;
}

struct metric *metric_counter(const char *name, const char *help, const char *labels)
{
    return add(COUNTER, name, help, labels);
}

struct metric *metric_gauge(const char *name, const char *help, const char *labels)
{
    return add(GAUGE, name, help, labels);
}

struct metric *metric_histogram(const char *name, const char *help, const char *labels, const double *bounds, int count)
{
    assert(count >= 1 && count <= BOUNDS_MAX);
    for (int i = 1; i < count; i++)
        assert(bounds[i] > bounds[i - 1]);
    struct metric *m = add(HISTOGRAM, name, help, labels);
    pthread_mutex_lock(&m->lock);
    if (m != &lost && m->bound_count == 0) {
        m->bound_count = count;
        memcpy(m->bounds, bounds, (size_t)m->bound_count * sizeof *bounds);
    }
    pthread_mutex_unlock(&m->lock);
    return m;
}

void metric_add(struct metric *m, double value)
{
    double old = atomic_load(&m->value);
    while (!atomic_compare_exchange_weak(&m->value, &old, old + value))
        continue;
}

void metric_set(struct metric *m, double value)
{
    atomic_store(&m->value, value);
}

void metric_observe(struct metric *m, double value)
{
    pthread_mutex_lock(&m->lock);
    int i = 0;
    while (i < m->bound_count && value > m->bounds[i])
        i++;
    m->buckets[i]++;
    m->sum += value;
    pthread_mutex_unlock(&m->lock);
}

double metric_value(const struct metric *m)
{
    return atomic_load(&m->value);
}

/* --- the page ---------------------------------------------------------------------------------------- */

/* Prometheus spells what printf would write as "inf" and "nan" its own way. */
static void print_number(FILE *f, double value)
{
    if (isnan(value))
        fputs("NaN\n", f);
    else if (isinf(value))
        fputs(value > 0 ? "+Inf\n" : "-Inf\n", f);
    else
        fprintf(f, "%.17g\n", value);
}

static void print_help(FILE *f, const struct metric *m)
{
    fprintf(f, "# HELP %s ", m->name);
    for (const char *c = m->help; *c; c++) {
        if (*c == '\\' || *c == '\n')
            fputc('\\', f);
        fputc(*c == '\n' ? 'n' : *c, f);
    }
    fputc('\n', f);
}

static void print_histogram(FILE *f, struct metric *m)
{
    pthread_mutex_lock(&m->lock);
    const char *labels = m->labels ? m->labels : "", *comma = m->labels ? "," : "";
    const char *open = m->labels ? "{" : "", *close = m->labels ? "}" : "";
    uint64_t total = 0;
    for (int i = 0; i <= m->bound_count; i++) {
        total += m->buckets[i];
        if (i < m->bound_count)
            fprintf(f, "%s_bucket{%s%sle=\"%g\"} %llu\n", m->name, labels, comma, m->bounds[i], (unsigned long long)total);
        else
            fprintf(f, "%s_bucket{%s%sle=\"+Inf\"} %llu\n", m->name, labels, comma, (unsigned long long)total);
    }
    fprintf(f, "%s_sum%s%s%s ", m->name, open, labels, close);
    print_number(f, m->sum);
    fprintf(f, "%s_count%s%s%s %llu\n", m->name, open, labels, close, (unsigned long long)total);
    pthread_mutex_unlock(&m->lock);
}

static void print_series(FILE *f, struct metric *m)
{
    if (m->kind == HISTOGRAM)
        print_histogram(f, m);
    else {
        const char *open = m->labels ? "{" : "", *close = m->labels ? "}" : "";
        fprintf(f, "%s%s%s%s ", m->name, open, m->labels ? m->labels : "", close);
        print_number(f, metric_value(m));
    }
}

static bool is_first_of_family(const struct metric *m)
{
    for (const struct metric *o = first; o != m; o = o->next)
        if (strcmp(o->name, m->name) == 0)
            return false;
    return true;
}

char *metric_text(void)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = open_memstream(&text, &bytes);
    if (!f)
        return NULL;
    pthread_mutex_lock(&registry_lock);
    for (struct metric *m = first; m; m = m->next) {
        if (!is_first_of_family(m))
            continue;
        print_help(f, m);
        fprintf(f, "# TYPE %s %s\n", m->name, types[m->kind]);
        for (struct metric *s = m; s; s = s->next)
            if (strcmp(s->name, m->name) == 0)
                print_series(f, s);
    }
    pthread_mutex_unlock(&registry_lock);
    fclose(f);
    return text;
}

/* --- the server ----------------------------------------------------------------------------------------- */

static enum MHD_Result respond(struct MHD_Connection *connection, unsigned status, char *text, bool is_ours)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(strlen(text), text,
                                                             is_ours ? MHD_RESPMEM_MUST_FREE : MHD_RESPMEM_PERSISTENT);
    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, "Content-Type", "text/plain; version=0.0.4; charset=utf-8");
    enum MHD_Result result = MHD_queue_response(connection, status, r);
    MHD_destroy_response(r);
    return result;
}

static enum MHD_Result answer(void *context, struct MHD_Connection *connection, const char *url, const char *method,
                              const char *version, const char *data, size_t *data_bytes, void **state)
{
    (void)context, (void)version, (void)data, (void)data_bytes, (void)state;
    if (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0)
        return respond(connection, 405, "only GET\n", false);
    if (strcmp(url, "/metrics") == 0) {
        char *text = metric_text();
        return text ? respond(connection, 200, text, true) : respond(connection, 503, "no memory\n", false);
    }
    if (strcmp(url, "/healthz") == 0)
        return respond(connection, 200, "ok\n", false);
    if (strcmp(url, "/readyz") == 0) {
        bool ready = !server.ready || server.ready(server.context);
        return respond(connection, ready ? 200 : 503, ready ? "ready\n" : "not ready\n", false);
    }
    return respond(connection, 404, "have /metrics, /healthz and /readyz\n", false);
}

bool metric_serve(uint16_t port, bool (*ready)(void *), void *context, uint16_t *ret_port, char *why, unsigned long why_bytes)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    assert(!server.daemon);
    server.ready = ready;
    server.context = context;
    /* AUTO: not select(), which fails once the process has a thousand descriptors open. */
    server.daemon = MHD_start_daemon(MHD_USE_AUTO | MHD_USE_INTERNAL_POLLING_THREAD, port, NULL, NULL, answer, NULL, MHD_OPTION_SOCK_ADDR,
                                     (struct sockaddr *)&address, MHD_OPTION_CONNECTION_LIMIT, 16u,
                                     MHD_OPTION_CONNECTION_TIMEOUT, 10u, MHD_OPTION_END);
    if (!server.daemon) {
        snprintf(why, why_bytes, "metrics port 127.0.0.1:%u cannot be opened; is it taken?", port);
        return false;
    }
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(server.daemon, MHD_DAEMON_INFO_BIND_PORT);
    if (ret_port)
        *ret_port = info ? info->port : port;
    return true;
}

void metric_stop(void)
{
    if (server.daemon)
        MHD_stop_daemon(server.daemon);
    server.daemon = NULL;
}
