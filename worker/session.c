/* session.c - one socket at a time; the next one has another routing id (link.h says why). */
#include "session.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "log.h"

#define WAIT_MIN_MS 1000
#define WAIT_MAX_MS 32000
#define GREET_AGAIN_MS 500        /* after "say hello first" */
#define HEARTBEAT_DEFAULT_MS 1000
#define SILENT_MIN_MS 1000

static void say_hello(struct session *s, int64_t now_ms)
{
    s->state = SESSION_GREETING;
    s->must_greet = false;
    s->greet_ms = now_ms + s->wait_ms;
    s->wait_ms = 2 * s->wait_ms < WAIT_MAX_MS ? 2 * s->wait_ms : WAIT_MAX_MS;
    if (link_send(s->link, NULL, &s->hello) != LINK_SENT)
        log_event(LOG_WARN, "hello_not_sent", "endpoint=%s", s->endpoint);
}

static void connect_anew(struct session *s, int64_t now_ms)
{
    char why[256];
    struct link *fresh;
    if (!link_connect(&fresh, s->endpoint, s->identity, why, sizeof why)) {
        log_event(LOG_WARN, "connect_failed", "why=%s", log_quote(why)); /* no descriptors left: later */
        s->state = SESSION_GREETING;
        s->must_greet = false;
        s->greet_ms = now_ms + s->wait_ms;
        return;
    }
    link_close(&s->link, 0);
    s->link = fresh;
    say_hello(s, now_ms);
}

bool session_open(struct session *s, const char *endpoint, const struct msg_hello *hello, int64_t now_ms, char *why,
                  size_t why_bytes)
{
    memset(s, 0, sizeof *s);
    s->endpoint = endpoint;
    s->hello.kind = MSG_HELLO;
    s->hello.hello = *hello;
    s->wait_ms = WAIT_MIN_MS;
    s->heartbeat_ms = HEARTBEAT_DEFAULT_MS;
    s->silent_ms = 5 * HEARTBEAT_DEFAULT_MS;
    snprintf(s->identity, sizeof s->identity, "%s/%" PRIu64, hello->worker, hello->boot_epoch);
    if (!link_connect(&s->link, endpoint, s->identity, why, why_bytes))
        return false;
    say_hello(s, now_ms);
    return true;
}

void session_close(struct session *s, int linger_ms)
{
    link_close(&s->link, linger_ms);
}

void session_step(struct session *s, int64_t now_ms)
{
    if (s->state == SESSION_WELCOME && now_ms - s->heard_ms > s->silent_ms) {
        log_event(LOG_WARN, "coordinator_silent", "endpoint=%s silent_ms=%" PRId64, s->endpoint, now_ms - s->heard_ms);
        s->wait_ms = WAIT_MIN_MS;
        connect_anew(s, now_ms);
    } else if (s->state == SESSION_GREETING && now_ms >= s->greet_ms) {
        if (s->must_greet) {
            say_hello(s, now_ms);
        } else {
            log_event(LOG_INFO, "hello_unanswered", "endpoint=%s next_wait_ms=%d", s->endpoint, s->wait_ms);
            connect_anew(s, now_ms);
        }
    }
}

int64_t session_next_ms(const struct session *s)
{
    return s->state == SESSION_WELCOME ? s->heard_ms + s->silent_ms + 1 : s->greet_ms;
}

bool session_send(struct session *s, const struct msg *m)
{
    if (s->state != SESSION_WELCOME)
        return false;
    enum link_sent sent = link_send(s->link, NULL, m);
    if (sent == LINK_SEND_ERROR)
        log_event(LOG_ERROR, "send_failed", "message=%s", msg_kind_name(m->kind));
    return sent == LINK_SENT;
}

/* --- what the coordinator says about us ------------------------------------------------------------------ */

static enum session_event be_welcome(struct session *s, const struct msg_welcome *w)
{
    const struct msg_hello *h = &s->hello.hello;
    if (w->protocol < h->protocol_min || w->protocol > h->protocol_max) {
        snprintf(s->refusal, sizeof s->refusal, "coordinator %.128s chose protocol %" PRIu32 ", this worker speaks %" PRIu32 " to %" PRIu32,
                 w->coordinator, w->protocol, h->protocol_min, h->protocol_max);
        return SESSION_REFUSED_FOR_GOOD;
    }
    s->state = SESSION_WELCOME;
    s->number++;
    s->wait_ms = WAIT_MIN_MS;
    s->heartbeat_ms = w->heartbeat_ms ? w->heartbeat_ms : HEARTBEAT_DEFAULT_MS;
    s->silent_ms = w->silent_ms > SILENT_MIN_MS ? w->silent_ms : SILENT_MIN_MS;
    log_event(LOG_INFO, "welcome", "coordinator=%s heartbeat_ms=%" PRIu32 " silent_ms=%" PRIu32, log_quote(w->coordinator),
              s->heartbeat_ms, s->silent_ms);
    return SESSION_WELCOMED;
}

/* A coordinator that was restarted does not know us: it asks for HELLO. Others have reasons that may pass. */
static enum session_event be_refused(struct session *s, const struct msg_refused *r, int64_t now_ms)
{
    log_event(LOG_WARN, "refused", "reason=%s final=%d", log_quote(r->reason), r->is_final);
    if (r->is_final) {
        snprintf(s->refusal, sizeof s->refusal, "%s", r->reason);
        return SESSION_REFUSED_FOR_GOOD;
    }
    bool was_welcome = s->state == SESSION_WELCOME;
    if (was_welcome)
        s->wait_ms = WAIT_MIN_MS;
    s->state = SESSION_GREETING;
    s->must_greet = true;
    s->greet_ms = now_ms + (was_welcome ? GREET_AGAIN_MS : s->wait_ms);
    return SESSION_NOTHING;
}

enum session_event session_hear(struct session *s, struct msg *ret, int64_t now_ms)
{
    char why[256];
    struct msg m;
    for (;;) {
        enum link_got got = link_receive(s->link, &m, NULL, why, sizeof why);
        if (got == LINK_EMPTY)
            return SESSION_NOTHING;
        if (got == LINK_ERROR) {
            log_event(LOG_ERROR, "receive_failed", "why=%s", log_quote(why));
            return SESSION_NOTHING;
        }
        if (got == LINK_BAD) {
            log_event(LOG_WARN, "bad_message", "why=%s", log_quote(why));
            continue;
        }
        s->heard_ms = now_ms;
        enum session_event event = SESSION_WORD;
        if (m.kind == MSG_WELCOME)
            event = be_welcome(s, &m.welcome);
        else if (m.kind == MSG_REFUSED)
            event = be_refused(s, &m.refused, now_ms);
        else if (m.kind == MSG_HEARTBEAT || s->state != SESSION_WELCOME)
            event = SESSION_NOTHING;
        if (event == SESSION_WORD)
            *ret = m;
        else
            msg_done(&m);
        if (event != SESSION_NOTHING)
            return event;
    }
}
