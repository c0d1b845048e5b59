/* worker_metric.c - the list of metrics. */
#include "worker_metric.h"

#include <stddef.h>

static struct worker_metric all;

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

const struct worker_metric *worker_metric_all(void)
{
    static const double sizes[] = {1, 2, 4, 8, 16, 32, 64};
    static const double seconds[] = {0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800};
    char label[64];
    if (all.images)
        return &all;
    all.images = metric_counter("kiln_worker_images_total", "Images staged and spooled.", NULL);
    all.stale = metric_counter("kiln_worker_stale_total", "Results that another worker's lease had overtaken.", NULL);
    all.publish_failures = metric_counter("kiln_worker_publish_failures_total", "Committed images whose file could not be published.", NULL);
    all.repeats = metric_counter("kiln_worker_repeats_total", "Results and failures said again because no answer came.", NULL);
    for (enum msg_failure i = 0; i <= MSG_FAILURE_RELEASED; i++)
        all.failures[i] = metric_counter("kiln_worker_failures_total", "Tasks that did not become images, by kind.",
                                         metric_label(label, sizeof label, "kind", msg_failure_name(i)));
    all.batch_size = metric_histogram("kiln_worker_batch_images", "Images rendered at once.", NULL, sizes, COUNT(sizes));
    all.render_seconds = metric_histogram("kiln_worker_render_seconds", "Time of a rendered batch.", NULL, seconds, COUNT(seconds));
    all.stage_seconds = metric_histogram("kiln_worker_stage_seconds", "Time to encode, write and spool an image.", NULL, seconds, COUNT(seconds));
    all.held = metric_gauge("kiln_worker_held_images", "Images assigned and not yet reported.", NULL);
    all.spooled = metric_gauge("kiln_worker_spooled_results", "Results without a settled answer.", NULL);
    all.is_blocked = metric_gauge("kiln_worker_blocked", "1 while finished images cannot be written.", NULL);
    all.is_connected = metric_gauge("kiln_worker_connected", "1 while a coordinator has welcomed this worker.", NULL);
    return &all;
}
