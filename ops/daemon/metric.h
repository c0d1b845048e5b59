/* metric.h - counters, gauges and histograms, served as Prometheus text on a loopback port (/metrics, /healthz, /readyz).
 *
 * A series is registered once and lives as long as the process: the same name and labels give the same object again. Name
 * and help must outlive the process (literals), labels are copied and stand on the page as they are. Updates are
 * atomic and cheap. Names end in _total, _seconds, _bytes as Prometheus asks; promtool checks the page in the tests.
 * libmicrohttpd is named here only. */
#ifndef KILN_METRIC_H
#define KILN_METRIC_H

#include <stdbool.h>
#include <stdint.h>

struct metric; /* one series, maybe with labels */

/* metric_label writes name="value", where value is a plain word, and returns it: the labels of a series. */
const char *metric_label(char *ret, unsigned long ret_bytes, const char *name, const char *value);

struct metric *metric_counter(const char *name, const char *help, const char *labels); /* labels: NULL or "kind=\"retry\"" */
struct metric *metric_gauge(const char *name, const char *help, const char *labels);
struct metric *metric_histogram(const char *name, const char *help, const char *labels, const double *bounds, int count); /* bounds: 1 to 32, rising */
void metric_add(struct metric *m, double value);
void metric_set(struct metric *m, double value);
void metric_observe(struct metric *m, double value);
double metric_value(const struct metric *m);
char *metric_text(void); /* the whole page, malloc'ed */

/* metric_serve opens 127.0.0.1:port (0: any free; *ret_port says which). ready says whether /readyz is 200. */
bool metric_serve(uint16_t port, bool (*ready)(void *), void *context, uint16_t *ret_port, char *why, unsigned long why_bytes);
void metric_stop(void);

#endif
