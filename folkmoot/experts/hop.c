/* The hot path of one hop to the expert hosts and back, on both ends: route, pack, post, wait, check, combine.
 *
 * Everything here could be done in Python; it is C because it runs once a layer and token step, where a hundred
 * microseconds of Python would cost more than moving the bytes. Called through ctypes (folkmoot/experts/native.py),
 * which drops the GIL; nothing here allocates, locks or knows of Python. The structs stand in native.py as well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define MAX_WAITERS 1024
#define ALIGN64(n) (((n) + 63) & ~(int64_t)63)

enum { PENDING = 0, READY = 1, CLOSED = 2 };                              /* a waiter */
enum { IDLE = 0, WAITING = 1, DONE = 2, GONE = 3, WRONG = 4, READABLE = 5 }; /* a link */
enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { REQUEST = 1, REPLY = 2, ERROR_REPLY = 3, FLAG_SUM = 1, MAGIC = 0x316B4D46 };
enum { /* why a request is refused: the messages are in host.py */
    OK = 0, BAD_KIND = -1, BAD_INCARNATION = -2, BAD_SEQUENCE = -3, BAD_LAYER = -4, BAD_ROWS = -5, BAD_SIZE = -6,
    BAD_SLOT = -7, BAD_TOKEN = -8
};

/* Offsets in a shared segment's first page: see wire.py. */
enum { REQUEST_FLAG = 0, HOST_SLEEPING = 64, REPLY_FLAG = 128, ENGINE_SLEEPING = 192, REQUEST_HEADER = 256,
       REPLY_HEADER = 320 };

struct header { /* wire.py: Header */
    uint32_t magic;
    uint16_t kind, flags;
    uint64_t seq, map_version, engine_incarnation, host_incarnation;
    uint32_t layer, rows, pairs, payload_bytes;
    uint64_t posted_us; /* by the engine's monotonic clock */
};
_Static_assert(sizeof(struct header) == 64, "the header is 64 bytes");

/* One thing to wait for. With a flag: ready once *flag == want, and `fd` only rings and tells of a death.
 * Without: ready once fd is readable. state PENDING is set by the caller; others are skipped. */
struct waiter {
    uint64_t *flag;     /* in shared memory, written by the peer */
    uint32_t *sleeping; /* in shared memory: 1 + our core while we block, so ring */
    uint64_t want;
    int32_t fd, state;
};

/* ---- waiting and ringing -------------------------------------------------------------------------------------- */

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void publish(uint8_t *page, int flag, uint64_t value) {
    __atomic_store_n((uint64_t *)(page + flag), value, __ATOMIC_SEQ_CST);
}

/* A sleeper says on which core it went to sleep: 1 + core, 0 while it is awake. */
static uint32_t sleeper(uint8_t *page, int sleeping) {
    return __atomic_load_n((uint32_t *)(page + sleeping), __ATOMIC_SEQ_CST);
}

static void ring(int fd) {
    (void)!send(fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL); /* a full socket has been rung already */
}

static int check_flags(struct waiter *w, int n) {
    int found = 0;
    for (int i = 0; i < n; i++)
        if (w[i].state == PENDING && w[i].flag && __atomic_load_n(w[i].flag, __ATOMIC_ACQUIRE) == w[i].want) {
            w[i].state = READY;
            found++;
        }
    return found;
}

static void set_sleeping(struct waiter *w, int n, uint32_t value) {
    for (int i = 0; i < n; i++)
        if (w[i].sleeping && (w[i].state == PENDING || !value))
            __atomic_store_n(w[i].sleeping, value, __ATOMIC_SEQ_CST);
}

/* Read away the doorbell's bytes; end-of-file or an error is a death. A peer rings at most once a request, so one that
 * floods the doorbell, and would keep us at reading it, counts as gone too. */
static int drain(int fd) {
    char bytes[256];
    ssize_t got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got > 0) return got == sizeof bytes ? -1 : 0;
    return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

static int poll_once(struct waiter *w, int n, int64_t timeout_us) {
    struct pollfd fds[MAX_WAITERS];
    int index[MAX_WAITERS], m = 0, found = 0;
    for (int i = 0; i < n; i++)
        if (w[i].state == PENDING) {
            fds[m] = (struct pollfd){.fd = w[i].fd, .events = POLLIN};
            index[m++] = i;
        }
    struct timespec limit = {timeout_us / 1000000, timeout_us % 1000000 * 1000};
    if (ppoll(fds, m, timeout_us < 0 ? NULL : &limit, NULL) <= 0) return 0;
    for (int j = 0; j < m; j++) {
        struct waiter *one = &w[index[j]];
        if (!fds[j].revents) continue;
        if (!one->flag) {
            one->state = READY;
            found++;
        } else if (fds[j].revents & POLLNVAL || drain(one->fd) < 0) {
            one->state = __atomic_load_n(one->flag, __ATOMIC_ACQUIRE) == one->want ? READY : CLOSED;
            found++;
        }
    }
    return found;
}

/* Wait until something pending is ready or closed; returns how many are. 0 after timeout_us (negative: never).
 * Yields the core for yield_us first (a peer on the same core needs it to answer), then blocks. */
int fm_wait(struct waiter *w, int n, int64_t yield_us, int64_t timeout_us) {
    int64_t began = now_us();
    int found;
    if (n > MAX_WAITERS) return -1;
    do {
        if ((found = check_flags(w, n))) return found;
        sched_yield();
    } while (now_us() - began < yield_us);
    for (;;) {
        set_sleeping(w, n, 1 + sched_getcpu());
        found = check_flags(w, n); /* what came before the peer could see that we sleep */
        int64_t left = timeout_us < 0 ? -1 : timeout_us - (now_us() - began);
        if (!found) found = poll_once(w, n, timeout_us >= 0 && left < 0 ? 0 : left);
        set_sleeping(w, n, 0);
        found += check_flags(w, n);
        if (found || (timeout_us >= 0 && left <= 0)) return found;
    }
}

/* ---- the engine's end ----------------------------------------------------------------------------------------- */

struct link { /* native.Link: one connection to a host */
    struct header header; /* of the last request */
    uint8_t *request, *reply, *page; /* areas for payloads; page is NULL for TCP */
    int64_t reply_limit;
    uint64_t engine_incarnation, host_incarnation, seq;
    int64_t posted_us, took_us; /* when the last request was posted, and how long its reply took */
    int32_t fd, state, rows, last_token, number, pad; /* number: never used again for another link */
};

struct call { /* native.Call: one layer's rows. Pairs are (token, slot) in row-major order. */
    const uint8_t *x;      /* [tokens] rows of row_bytes */
    const int32_t *ids;    /* [pairs] logical experts */
    const float *weights;  /* [pairs] */
    const int32_t *table;  /* [experts][replicas][2]: (link, slot), link -1 for none */
    uint8_t *done;         /* [pairs]: has its row */
    int32_t *host, *row;   /* [pairs]: number of the link asked, and row in that link's reply */
    const uint8_t **rows;  /* [pairs]: where the row lies; NULL if its sum came with another pair's */
    float *factors;        /* [pairs]: what the row counts in the sum */
    int64_t *served;       /* [experts]: rows so far */
    int32_t *scratch;      /* [experts * (1 + replicas)] */
    int64_t *cost;         /* [links] */
    const int64_t *start;  /* [links]: what each costs before it has any row */
    uint64_t map_version;
    int64_t row_bytes;
    int32_t pairs, k, experts, replicas, links, expert_cost, layer, flags;
};

/* Pour an expert's rows over its replicas, so that their hosts' costs are as level as they can be: share[r] for each.
 * A replica takes part if that leaves it no fewer rows than reading the weights costs. */
static void pour(struct call *c, int e, int32_t rows, int32_t *share) {
    const int32_t *of = &c->table[e * c->replicas * 2];
    int64_t sum = rows, used = 0;
    for (int r = 0; r < c->replicas; r++) share[r] = 0;
    for (;; used++) {
        int best = -1;
        for (int r = 0; r < c->replicas && of[r * 2] >= 0; r++)
            if (!share[r] && (best < 0 || c->cost[of[r * 2]] < c->cost[of[best * 2]])) best = r;
        if (best < 0) break;
        int64_t base = c->cost[of[best * 2]] + c->expert_cost, level = (sum + base) / (used + 1);
        if (used && level - base < (c->expert_cost > 0 ? c->expert_cost : 1)) break;
        sum += base;
        share[best] = 1;
    }
    int64_t level = (sum + used - 1) / used;
    for (int r = 0; r < c->replicas && of[r * 2] >= 0; r++) {
        if (!share[r]) continue;
        int64_t *cost = &c->cost[of[r * 2]], n = level - *cost - c->expert_cost;
        share[r] = n < rows ? n : rows;
        rows -= share[r];
        if (share[r]) *cost += share[r] + c->expert_cost;
    }
}

/* How many rows of each expert go to each of its replicas. Experts without a choice first, then the larger ones.
 * Cost = rows + expert_cost. Returns 0; -1 - e for an expert e without a replica; INT32_MIN for an id out of range. */
static int choose_replicas(struct call *c) {
    int32_t *count = c->scratch, *share = c->scratch + c->experts, largest = 0;
    memset(count, 0, sizeof(int32_t) * c->experts);
    memset(share, 0, sizeof(int32_t) * c->experts * c->replicas);
    memcpy(c->cost, c->start, sizeof(int64_t) * c->links);
    for (int p = 0; p < c->pairs; p++) {
        if (c->done[p]) continue;
        if (c->ids[p] < 0 || c->ids[p] >= c->experts) return INT32_MIN;
        count[c->ids[p]]++;
    }
    for (int e = 0; e < c->experts; e++) {
        const int32_t *of = &c->table[e * c->replicas * 2];
        if (!count[e]) continue;
        if (of[0] < 0) return -1 - e;
        if (count[e] > largest) largest = count[e];
        if (c->replicas == 1 || of[2] < 0) {
            share[e * c->replicas] = count[e];
            c->cost[of[0]] += count[e] + c->expert_cost;
            count[e] = 0;
        }
    }
    for (int size = largest; size > 0; size = size > 8 ? size / 2 : size - 1)
        for (int e = 0; e < c->experts; e++) {
            if (count[e] < size) continue;
            pour(c, e, count[e], share + e * c->replicas);
            count[e] = 0;
        }
    return 0;
}

/* Requests: x [pairs], slots int32 [pairs], and in sum mode token int32 [pairs] and weight float32 [pairs]. */
static void pack(struct call *c, struct link **links) {
    int32_t *filling = c->scratch, *share = c->scratch + c->experts; /* filling: 0 for each expert by now */
    for (int i = 0; i < c->links; i++) links[i]->rows = 0, links[i]->last_token = -1, links[i]->state = IDLE;
    for (int i = 0; i < c->experts * c->replicas; i++)
        if (share[i]) links[c->table[i * 2]]->rows += share[i];
    for (int i = 0; i < c->links; i++) { /* where the columns begin; rows then counts again, as they are filled */
        struct link *l = links[i];
        l->header.pairs = l->rows;
        l->header.rows = 0;
        l->rows = 0;
    }
    for (int p = 0; p < c->pairs; p++) {
        if (c->done[p]) continue;
        int e = c->ids[p], token = p / c->k;
        while (!share[e * c->replicas + filling[e]]) filling[e]++;
        int at = e * c->replicas + filling[e];
        share[at]--;
        const int32_t *replica = &c->table[at * 2];
        struct link *l = links[replica[0]];
        int64_t pairs = l->header.pairs, row = l->rows++, slots = ALIGN64(pairs * c->row_bytes);
        if (token != l->last_token) l->header.rows++;
        memcpy(l->request + row * c->row_bytes, c->x + token * c->row_bytes, c->row_bytes);
        ((int32_t *)(l->request + slots))[row] = replica[1];
        if (c->flags & FLAG_SUM) {
            int64_t column = ALIGN64(pairs * 4);
            ((int32_t *)(l->request + slots + column))[row] = l->header.rows - 1;
            ((float *)(l->request + slots + 2 * column))[row] = c->weights[p];
            c->row[p] = token == l->last_token ? -1 : (int32_t)l->header.rows - 1;
        } else {
            c->row[p] = row;
        }
        l->last_token = token;
        c->host[p] = l->number;
        c->served[e]++;
    }
}

static void write_header(struct call *c, struct link *l) {
    struct header *h = &l->header;
    int64_t pairs = h->pairs, slots = ALIGN64(pairs * c->row_bytes);
    if (!(c->flags & FLAG_SUM)) h->rows = pairs;
    *h = (struct header){
        .magic = MAGIC, .kind = REQUEST, .flags = c->flags, .seq = ++l->seq, .map_version = c->map_version,
        .engine_incarnation = l->engine_incarnation, .host_incarnation = l->host_incarnation, .layer = c->layer,
        .rows = h->rows, .pairs = pairs,
        .payload_bytes = slots + (c->flags & FLAG_SUM ? 3 * ALIGN64(pairs * 4) : pairs * 4),
        .posted_us = l->posted_us = now_us()};
    l->state = WAITING;
    if (l->page) memcpy(l->page + REQUEST_HEADER, h, sizeof *h);
}

/* Route and pack the pairs that are not done; post to every shared-memory host before ringing any, and ring those that
 * sleep on our own core last, since they may take it from us when they wake. Links with rows are WAITING after it; those over TCP are the caller's to send.
 * Returns as choose_replicas. */
int fm_begin(struct call *c, struct link **links) {
    int status = choose_replicas(c);
    if (status) return status;
    pack(c, links);
    for (int i = 0; i < c->links; i++)
        if (links[i]->rows) write_header(c, links[i]);
    for (int i = 0; i < c->links; i++)
        if (links[i]->state == WAITING && links[i]->page) publish(links[i]->page, REQUEST_FLAG, links[i]->seq);
    uint32_t here = 1 + sched_getcpu();
    for (int own = 0; own < 2; own++)
        for (int i = 0; i < c->links; i++) {
            if (links[i]->state != WAITING || !links[i]->page) continue;
            uint32_t where = sleeper(links[i]->page, HOST_SLEEPING);
            if (where && (where == here) == own) ring(links[i]->fd);
        }
    return 0;
}

/* Check a reply against its request, and note where each pair's row lies. Sets the link DONE or WRONG. */
void fm_collect(struct call *c, struct link *l, const struct header *reply) {
    struct header expected = l->header;
    expected.kind = REPLY;
    expected.payload_bytes = l->header.rows * c->row_bytes;
    l->state = memcmp(reply, &expected, sizeof expected) || expected.payload_bytes > l->reply_limit ? WRONG : DONE;
    if (l->state != DONE) return;
    l->took_us = now_us() - l->posted_us;
    for (int p = 0; p < c->pairs; p++) {
        if (c->done[p] || c->host[p] != l->number) continue;
        c->rows[p] = c->row[p] < 0 ? NULL : l->reply + c->row[p] * c->row_bytes;
        c->factors[p] = c->flags & FLAG_SUM ? 1.0f : c->weights[p];
        c->done[p] = 1;
    }
}

/* Wait for the WAITING links. Returns 0 once all are DONE; 1 as soon as one is GONE, WRONG or (TCP) READABLE; 2 after
 * timeout_us. */
int fm_finish(struct call *c, struct link **links, int64_t yield_us, int64_t timeout_us) {
    struct waiter w[MAX_WAITERS];
    int index[MAX_WAITERS], n = 0, left = 0, attention = 0;
    int64_t began = now_us();
    for (int i = 0; i < c->links && n < MAX_WAITERS; i++) {
        struct link *l = links[i];
        if (l->state != WAITING) continue;
        w[n] = (struct waiter){.want = l->seq, .fd = l->fd};
        if (l->page) {
            w[n].flag = (uint64_t *)(l->page + REPLY_FLAG);
            w[n].sleeping = (uint32_t *)(l->page + ENGINE_SLEEPING);
        }
        index[n++] = i;
    }
    for (left = n; left > 0 && !attention;) {
        int64_t limit = timeout_us - (now_us() - began);
        if (fm_wait(w, n, yield_us, limit > 0 ? limit : 0) <= 0) return 2;
        for (int j = 0; j < n; j++) {
            struct link *l = links[index[j]];
            if (w[j].state == PENDING || l->state != WAITING) continue;
            left--;
            if (w[j].state == CLOSED) l->state = GONE;
            else if (!l->page) l->state = READABLE;
            else {
                struct header reply;
                memcpy(&reply, l->page + REPLY_HEADER, sizeof reply);
                fm_collect(c, l, &reply);
            }
            attention |= l->state != DONE;
        }
    }
    return attention;
}

/* ---- the host's end ------------------------------------------------------------------------------------------- */

struct connection { /* native.Connection: one engine */
    struct header header; /* of the request at hand */
    uint8_t *request, *reply, *page; /* page is NULL for TCP */
    const int32_t *num_slots; /* [num_layers]: experts held; 0 where none */
    int32_t *slots, *tokens;  /* [max_rows]: private copies, since the peer could still change its own */
    uint64_t engine_incarnation, host_incarnation, seq;
    int64_t row_bytes;
    int32_t fd, max_rows, num_layers, pad;
};

/* Check the request at hand, whatever the peer wrote, and copy its indices. Returns OK or what is wrong. */
int fm_take(struct connection *c) {
    struct header *h = &c->header;
    if (c->page) memcpy(h, c->page + REQUEST_HEADER, sizeof *h);
    if (h->magic != MAGIC || h->kind != REQUEST || (h->flags & ~FLAG_SUM)) return BAD_KIND;
    if (h->engine_incarnation != c->engine_incarnation || h->host_incarnation != c->host_incarnation)
        return BAD_INCARNATION;
    if (h->seq != ++c->seq) return BAD_SEQUENCE;
    if (h->layer >= (uint32_t)c->num_layers || c->num_slots[h->layer] == 0) return BAD_LAYER;
    if (h->rows == 0 || h->rows > h->pairs || h->pairs > (uint32_t)c->max_rows) return BAD_ROWS;
    int64_t slots = ALIGN64(h->pairs * c->row_bytes), column = ALIGN64((int64_t)h->pairs * 4);
    int sum = h->flags & FLAG_SUM;
    if (h->payload_bytes != slots + (sum ? 3 * column : (int64_t)h->pairs * 4) || (!sum && h->rows != h->pairs))
        return BAD_SIZE;
    const int32_t *theirs = (const int32_t *)(c->request + slots);
    const int32_t *tokens = (const int32_t *)(c->request + slots + column);
    for (uint32_t p = 0; p < h->pairs; p++) {
        int32_t slot = c->slots[p] = __atomic_load_n(&theirs[p], __ATOMIC_RELAXED);
        if (slot < 0 || slot >= c->num_slots[h->layer]) return BAD_SLOT;
        if (!sum) continue;
        int32_t token = c->tokens[p] = __atomic_load_n(&tokens[p], __ATOMIC_RELAXED);
        if (token < 0 || (uint32_t)token >= h->rows) return BAD_TOKEN;
    }
    return OK;
}

/* Turn the header into its reply's (kind REPLY, or ERROR_REPLY with payload_bytes of text); over shared memory,
 * publish it and ring. */
void fm_answer(struct connection *c, int kind, uint32_t payload_bytes) {
    c->header.kind = kind;
    c->header.payload_bytes = payload_bytes;
    if (!c->page) return;
    memcpy(c->page + REPLY_HEADER, &c->header, sizeof c->header);
    publish(c->page, REPLY_FLAG, c->seq);
    if (sleeper(c->page, ENGINE_SLEEPING)) ring(c->fd);
}

/* ---- combining ------------------------------------------------------------------------------------------------ */

static inline float bf16_to_f32(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t f32_to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

static inline uint32_t not_finite(float f) { /* as integers, which a compiler turns into vector code */
    uint32_t u;
    memcpy(&u, &f, 4);
    return (u & 0x7f800000) == 0x7f800000;
}

/* Whether a row holds an infinity or a NaN. */
#define FIND(NAME, T, LOAD)                                                 \
    CLONES static uint32_t NAME(const T *row, int64_t hidden) {             \
        uint32_t odd = 0;                                                   \
        for (int64_t i = 0; i < hidden; i++) odd |= not_finite(LOAD(row[i])); \
        return odd;                                                         \
    }

/* The first row is multiplied, the others are added, each by a fused multiply-add or by a product that is rounded: as
 * vLLM's kernel does it in float32. */
#define COMBINE(NAME, T, LOAD, STORE)                                                                          \
    CLONES static uint32_t NAME(T *restrict out, const uint8_t *const *rows, const float *w, int k, int fused, \
                                int64_t hidden) {                                                              \
        uint32_t odd = 0;                                                                                      \
        for (int64_t base = 0; base < hidden; base += 256) {                                                   \
            float acc[256] = {0};                                                                              \
            int64_t n = hidden - base < 256 ? hidden - base : 256;                                             \
            int first = 1;                                                                                     \
            for (int s = 0; s < k; s++) {                                                                      \
                if (!rows[s]) continue;                                                                        \
                const T *r = (const T *)rows[s] + base;                                                        \
                if (first) for (int64_t i = 0; i < n; i++) acc[i] = w[s] * LOAD(r[i]);                         \
                else if (fused) for (int64_t i = 0; i < n; i++) acc[i] = __builtin_fmaf(w[s], LOAD(r[i]), acc[i]); \
                else for (int64_t i = 0; i < n; i++) acc[i] += w[s] * LOAD(r[i]);                              \
                first = 0;                                                                                     \
            }                                                                                                  \
            for (int64_t i = 0; i < n; i++) out[base + i] = STORE(acc[i]), odd |= not_finite(acc[i]);          \
        }                                                                                                      \
        return odd;                                                                                            \
    }
#define SAME(v) (v)
#define TO_F16(v) ((_Float16)(v))
#define FROM_F16(v) ((float)(v))
COMBINE(combine_f32, float, SAME, SAME)
COMBINE(combine_bf16, uint16_t, bf16_to_f32, f32_to_bf16)
COMBINE(combine_f16, _Float16, FROM_F16, TO_F16)

FIND(find_f32, float, SAME)
FIND(find_bf16, uint16_t, bf16_to_f32)
FIND(find_f16, _Float16, FROM_F16)

static uint32_t find(const uint8_t *row, int64_t row_bytes, int dtype) {
    if (dtype == F32) return find_f32((const float *)row, row_bytes / 4);
    if (dtype == BF16) return find_bf16((const uint16_t *)row, row_bytes / 2);
    return find_f16((const _Float16 *)row, row_bytes / 2);
}

/* out[t] = sum over t's pairs, in slot order, of factors[p] * *rows[p]: accumulated in float32, rounded once. Returns
 * whether some sum is not finite. (It is not where a row is not, whatever its weight, so the rows need no look.) */
int fm_combine(const struct call *c, void *out, int dtype, int fused) {
    int64_t hidden = c->row_bytes / (dtype == F32 ? 4 : 2);
    uint32_t odd = 0;
    for (int t = 0; t < c->pairs / c->k; t++) {
        const uint8_t *const *rows = c->rows + (int64_t)t * c->k;
        const float *w = c->factors + (int64_t)t * c->k;
        if (dtype == F32) odd |= combine_f32((float *)out + t * hidden, rows, w, c->k, fused, hidden);
        else if (dtype == BF16) odd |= combine_bf16((uint16_t *)out + t * hidden, rows, w, c->k, fused, hidden);
        else odd |= combine_f16((_Float16 *)out + t * hidden, rows, w, c->k, fused, hidden);
    }
    return odd != 0;
}

/* Mark each pair whose row is not finite although its token's x is. Returns how many. */
int fm_doubt(const struct call *c, uint8_t *doubtful, int dtype) {
    int found = 0;
    for (int p = 0; p < c->pairs; p++) {
        const uint8_t *x = c->x + p / c->k * c->row_bytes;
        doubtful[p] = c->rows[p] && find(c->rows[p], c->row_bytes, dtype) && !find(x, c->row_bytes, dtype);
        found += doubtful[p];
    }
    return found;
}

/* Of waiter, link, call and connection: native.py takes no library that was built from another version of this file. */
void fm_sizes(int32_t *sizes) {
    sizes[0] = sizeof(struct waiter), sizes[1] = sizeof(struct link);
    sizes[2] = sizeof(struct call), sizes[3] = sizeof(struct connection);
}
