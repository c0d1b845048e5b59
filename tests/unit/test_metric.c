/* Tests of ops/daemon/metric.c. A page that Prometheus cannot read is a farm nobody watches; a wrong /readyz sends work to
 * a process that cannot take it. promtool (Debian package prometheus) judges the page when it is installed. */
#include "metric.h"

#include <arpa/inet.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static void assert_page_has(const char *lines)
{
    char *text = metric_text();
    assert_non_null(text);
    if (!strstr(text, lines))
        fail_msg("page lacks:\n%spage:\n%s", lines, text);
    free(text);
}

static void a_counter_is_help_type_and_value(void **state)
{
    (void)state;
    struct metric *m = metric_counter("test_images_total", "Images made.", NULL);
    assert_page_has("# HELP test_images_total Images made.\n# TYPE test_images_total counter\ntest_images_total 0\n");
    metric_add(m, 1);
    metric_add(m, 2.5);
    assert_true(metric_value(m) == 3.5);
    assert_page_has("\ntest_images_total 3.5\n");
}

static void large_counts_are_exact(void **state)
{
    (void)state;
    struct metric *m = metric_counter("test_large_total", "Large.", NULL);
    metric_add(m, 9007199254740992.0);
    assert_page_has("\ntest_large_total 9007199254740992\n");
}

static void the_same_name_and_labels_are_the_same_series(void **state)
{
    (void)state;
    struct metric *a = metric_gauge("test_state", "State.", "kind=\"a\"");
    struct metric *b = metric_gauge("test_state", "State.", "kind=\"b\"");
    char built[32];
    metric_label(built, sizeof built, "kind", "a");
    assert_ptr_equal(metric_gauge("test_state", "State.", built), a);
    assert_ptr_not_equal(a, b);
    metric_counter("test_between_total", "Registered between the series of a family.", NULL);
    metric_gauge("test_state", "State.", "kind=\"c\"");
    metric_set(a, 1);
    metric_set(b, -2);
    /* A family stands together, with one head, whatever was registered in between. */
    assert_page_has("# TYPE test_state gauge\ntest_state{kind=\"a\"} 1\ntest_state{kind=\"b\"} -2\ntest_state{kind=\"c\"} 0\n");
}

static void help_may_hold_anything(void **state)
{
    (void)state;
    metric_gauge("test_help", "Two\nlines and a \\.", NULL);
    assert_page_has("# HELP test_help Two\\nlines and a \\\\.\n# TYPE test_help gauge\n");
}

static void what_is_no_number_is_spelt_as_prometheus_spells_it(void **state)
{
    (void)state;
    metric_set(metric_gauge("test_nan", "NaN.", NULL), NAN);
    metric_set(metric_gauge("test_inf", "Infinity.", "sign=\"plus\""), INFINITY);
    metric_set(metric_gauge("test_inf", "Infinity.", "sign=\"minus\""), -INFINITY);
    assert_page_has("\ntest_nan NaN\n");
    assert_page_has("\ntest_inf{sign=\"plus\"} +Inf\ntest_inf{sign=\"minus\"} -Inf\n");
}

static void a_histogram_counts_up_to_each_bound(void **state)
{
    (void)state;
    static const double bounds[] = {0.001, 0.01, 2.5};
    struct metric *m = metric_histogram("test_wait_seconds", "Waits.", NULL, bounds, 3);
    struct metric *labelled = metric_histogram("test_wait_seconds", "Waits.", "kind=\"x\"", bounds, 3);
    const double values[] = {0.0005, 0.001, 0.0011, 2.5, 100};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        metric_observe(m, values[i]);
    metric_observe(labelled, 0.25);
    assert_page_has("# TYPE test_wait_seconds histogram\n"
                    "test_wait_seconds_bucket{le=\"0.001\"} 2\n"
                    "test_wait_seconds_bucket{le=\"0.01\"} 3\n"
                    "test_wait_seconds_bucket{le=\"2.5\"} 4\n"
                    "test_wait_seconds_bucket{le=\"+Inf\"} 5\n"
                    "test_wait_seconds_sum 102.5026");
    assert_page_has("\ntest_wait_seconds_count 5\n"
                    "test_wait_seconds_bucket{kind=\"x\",le=\"0.001\"} 0\n");
    assert_page_has("test_wait_seconds_sum{kind=\"x\"} 0.25\ntest_wait_seconds_count{kind=\"x\"} 1\n");
}

enum { THREADS = 4, EACH = 20000 };
static struct metric *shared_counter, *shared_histogram;

static void *count(void *context)
{
    (void)context;
    for (int i = 0; i < EACH; i++) {
        metric_add(shared_counter, 1);
        metric_observe(shared_histogram, i % 3);
        if (i % 5000 == 0)
            free(metric_text());
    }
    return NULL;
}

static void threads_lose_no_count(void **state)
{
    (void)state;
    static const double bounds[] = {0.5, 1.5};
    pthread_t threads[THREADS];
    shared_counter = metric_counter("test_shared_total", "Counted by threads.", NULL);
    shared_histogram = metric_histogram("test_shared", "Observed by threads.", NULL, bounds, 2);
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, count, NULL), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    assert_page_has("\ntest_shared_total 80000\n");
    assert_page_has("\ntest_shared_count 80000\n");
}

static void promtool_finds_nothing_to_say(void **state)
{
    (void)state;
    if (system("command -v promtool >/dev/null") != 0) {
        print_message("skipped: promtool is not installed (Debian package prometheus)\n");
        skip();
    }
    char *text = metric_text();
    FILE *f = popen("promtool check metrics >&2", "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    free(text);
    int status = pclose(f);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

/* --- over HTTP ------------------------------------------------------------------------------------------- */

static int dial(uint16_t port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0)
        return fd;
    close(fd);
    return -1;
}

/* ask returns the status; the whole answer, head and body, stands in ret. */
static int ask(uint16_t port, const char *method, const char *url, char *ret, size_t bytes)
{
    int fd = dial(port), status = 0;
    size_t n = 0;
    assert_true(fd >= 0);
    dprintf(fd, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", method, url);
    for (ssize_t got; n + 1 < bytes && (got = read(fd, ret + n, bytes - 1 - n)) > 0;)
        n += (size_t)got;
    ret[n] = 0;
    close(fd);
    assert_int_equal(sscanf(ret, "HTTP/1.1 %d", &status), 1);
    return status;
}

static bool is_ready;

static bool ready(void *context)
{
    return *(bool *)context;
}

static uint16_t serve(void)
{
    char why[256];
    uint16_t port = 0;
    if (!metric_serve(0, ready, &is_ready, &port, why, sizeof why))
        fail_msg("%s", why);
    assert_true(port > 0);
    return port;
}

static void any_free_port_serves_the_page_health_and_readiness(void **state)
{
    (void)state;
    static char answer[1 << 18];
    metric_counter("test_images_total", "Images made.", NULL);
    uint16_t port = serve();
    assert_int_equal(ask(port, "GET", "/metrics", answer, sizeof answer), 200);
    assert_non_null(strstr(answer, "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    char *text = metric_text(), *body = strstr(answer, "\r\n\r\n");
    assert_string_equal(body + 4, text);
    free(text);
    assert_int_equal(ask(port, "GET", "/healthz", answer, sizeof answer), 200);
    is_ready = false;
    assert_int_equal(ask(port, "GET", "/readyz", answer, sizeof answer), 503);
    is_ready = true;
    assert_int_equal(ask(port, "GET", "/readyz", answer, sizeof answer), 200);
    assert_int_equal(ask(port, "HEAD", "/metrics", answer, sizeof answer), 200);
    assert_string_equal(strstr(answer, "\r\n\r\n"), "\r\n\r\n");
    assert_int_equal(ask(port, "GET", "/", answer, sizeof answer), 404);
    assert_non_null(strstr(answer, "/readyz"));
    assert_int_equal(ask(port, "DELETE", "/metrics", answer, sizeof answer), 405);
    metric_stop();
    assert_int_equal(dial(port), -1);
    metric_stop(); /* twice is fine */
}

static void a_port_that_is_taken_is_a_sentence(void **state)
{
    (void)state;
    char why[256] = "", wanted[64];
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(fd, 1), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&at, &bytes), 0);
    uint16_t port = 77;
    assert_false(metric_serve(ntohs(at.sin_port), NULL, NULL, &port, why, sizeof why));
    snprintf(wanted, sizeof wanted, "127.0.0.1:%u", ntohs(at.sin_port));
    assert_non_null(strstr(why, wanted));
    assert_non_null(strstr(why, "taken"));
    assert_int_equal(port, 77);
    close(fd);
}

/* A scanner or a stuck browser must not keep Prometheus out. */
static void half_a_request_does_not_block_the_next(void **state)
{
    (void)state;
    char answer[1024];
    uint16_t port = serve();
    int idle[8];
    for (int i = 0; i < 8; i++) {
        idle[i] = dial(port);
        assert_true(idle[i] >= 0);
        dprintf(idle[i], "GET /hea");
    }
    assert_int_equal(ask(port, "GET", "/healthz", answer, sizeof answer), 200);
    for (int i = 0; i < 8; i++)
        close(idle[i]);
    metric_stop();
}

/* A process with many descriptors open (a coordinator of a large farm) still shows its page. */
static void a_thousand_open_descriptors_do_not_hide_the_page(void **state)
{
    (void)state;
    char answer[1024];
    enum { MANY = 1100 };
    int *fds = calloc(MANY, sizeof *fds), opened = 0;
    assert_non_null(fds);
    while (opened < MANY && (fds[opened] = dup(STDIN_FILENO)) >= 0)
        opened++;
    if (opened == MANY) {
        uint16_t port = serve();
        assert_int_equal(ask(port, "GET", "/healthz", answer, sizeof answer), 200);
        metric_stop();
    }
    for (int i = 0; i < opened; i++)
        close(fds[i]);
    free(fds);
    if (opened < MANY)
        skip(); /* the limit of descriptors here is lower */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_counter_is_help_type_and_value),
        cmocka_unit_test(large_counts_are_exact),
        cmocka_unit_test(the_same_name_and_labels_are_the_same_series),
        cmocka_unit_test(help_may_hold_anything),
        cmocka_unit_test(what_is_no_number_is_spelt_as_prometheus_spells_it),
        cmocka_unit_test(a_histogram_counts_up_to_each_bound),
        cmocka_unit_test(threads_lose_no_count),
        cmocka_unit_test(promtool_finds_nothing_to_say),
        cmocka_unit_test(any_free_port_serves_the_page_health_and_readiness),
        cmocka_unit_test(a_port_that_is_taken_is_a_sentence),
        cmocka_unit_test(half_a_request_does_not_block_the_next),
        cmocka_unit_test(a_thousand_open_descriptors_do_not_hide_the_page),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
