/* The hot path of one hop to the expert hosts and back: route, pack, post, wait, combine.
 *
 * Everything here could be done in Python; it is C because it runs once a layer and token step, where a millisecond
 * of Python would cost more than moving the bytes. Called through ctypes (folkmoot/experts/native.py), which drops
 * the GIL; nothing here allocates, locks or knows of Python. All sizes are checked by the callers in dispatcher.py.
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

enum { PENDING = 0, READY = 1, CLOSED = 2 };
enum { F32 = 0, BF16 = 1, F16 = 2 };

/* One thing to wait for. With a flag: ready once *flag == want, and `fd` only rings and tells of a death.
 * Without: ready once fd is readable. state PENDING is set by the caller; others are skipped. */
struct waiter {
    uint64_t *flag;     /* in shared memory, written by the peer */
    uint32_t *sleeping; /* in shared memory: we block, so ring */
    uint64_t want;
    int32_t fd;
    int32_t state;
};

/* One thing to post: the flag that the peer waits for, and whether it sleeps. */
struct post {
    uint64_t *flag;
    uint32_t *sleeping;
    uint64_t value;
    int32_t fd;
    int32_t pad;
};

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Publish every flag before ringing anyone: the first one woken may take our core. */
void fm_post(struct post *p, int n) {
    for (int i = 0; i < n; i++) __atomic_store_n(p[i].flag, p[i].value, __ATOMIC_SEQ_CST);
    for (int i = 0; i < n; i++)
        if (__atomic_load_n(p[i].sleeping, __ATOMIC_SEQ_CST))
            (void)!send(p[i].fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL); /* a full socket has been rung already */
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
        if (w[i].state == PENDING && w[i].sleeping) __atomic_store_n(w[i].sleeping, value, __ATOMIC_SEQ_CST);
}

/* Read away the doorbell's bytes; end-of-file or an error is a death. */
static int drain(int fd) {
    char bytes[256];
    ssize_t got;
    while ((got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT)) > 0) {}
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
    if (n > MAX_WAITERS) return -1;
    int64_t began = now_us();
    int found;
    do {
        if ((found = check_flags(w, n))) return found;
        sched_yield();
    } while (now_us() - began < yield_us);
    for (;;) {
        set_sleeping(w, n, 1);
        found = check_flags(w, n);
        if (!found) {
            int64_t left = timeout_us < 0 ? -1 : timeout_us - (now_us() - began);
            if (timeout_us >= 0 && left <= 0) {
                set_sleeping(w, n, 0);
                return 0;
            }
            found = poll_once(w, n, left);
            set_sleeping(w, n, 0);
            found += check_flags(w, n);
        } else {
            set_sleeping(w, n, 0);
        }
        if (found) {
            for (int i = 0; i < n; i++)
                if (w[i].sleeping) __atomic_store_n(w[i].sleeping, 0, __ATOMIC_SEQ_CST);
            return found;
        }
    }
}

/* Choose a replica for every expert that has rows, and a row of that host's request for every pair.
 *
 * ids: [pairs] logical experts. table: [experts][replicas][2] = (host index, slot), host -1 for none.
 * done: [pairs], pairs to skip, or NULL. Out: pair_host, pair_row, pair_slot [pairs]; host_rows [hosts];
 * served [experts] counts rows. scratch: [2 * experts] int32.
 * One expert's rows go to one replica, since a second copy would read its weights again; experts without a choice
 * are placed first, then the largest, each on the host with the least cost so far. Cost = rows + expert_cost.
 * Returns 0; -1 - e for an expert e without a replica; INT32_MIN for an id out of range. */
int fm_route(const int32_t *ids, int pairs, int experts, const int32_t *table, int replicas, int hosts,
             const uint8_t *done, int expert_cost, int32_t *pair_host, int32_t *pair_row, int32_t *pair_slot,
             int32_t *host_rows, int64_t *host_cost, int64_t *served, int32_t *scratch) {
    int32_t *count = scratch, *chosen = scratch + experts;
    memset(count, 0, sizeof(int32_t) * experts);
    for (int p = 0; p < pairs; p++) {
        if (done && done[p]) continue;
        if (ids[p] < 0 || ids[p] >= experts) return INT32_MIN;
        count[ids[p]]++;
    }
    memset(host_rows, 0, sizeof(int32_t) * hosts);
    memset(host_cost, 0, sizeof(int64_t) * hosts);
    int largest = 0;
    for (int e = 0; e < experts; e++) {
        chosen[e] = -1;
        if (!count[e]) continue;
        if (table[e * replicas * 2] < 0) return -1 - e;
        if (count[e] > largest) largest = count[e];
        if (replicas == 1 || table[(e * replicas + 1) * 2] < 0) {
            chosen[e] = 0;
            host_cost[table[e * replicas * 2]] += count[e] + expert_cost;
        }
        served[e] += count[e];
    }
    for (int size = largest; size > 0; size = size > 8 ? size / 2 : size - 1) /* largest first, roughly */
        for (int e = 0; e < experts; e++) {
            if (count[e] < size || chosen[e] >= 0) continue;
            const int32_t *row = &table[e * replicas * 2];
            int best = 0;
            for (int r = 1; r < replicas && row[r * 2] >= 0; r++)
                if (host_cost[row[r * 2]] < host_cost[row[best * 2]]) best = r;
            chosen[e] = best;
            host_cost[row[best * 2]] += count[e] + expert_cost;
        }
    for (int p = 0; p < pairs; p++) {
        if (done && done[p]) continue;
        const int32_t *replica = &table[(ids[p] * replicas + chosen[ids[p]]) * 2];
        pair_host[p] = replica[0];
        pair_slot[p] = replica[1];
        pair_row[p] = host_rows[replica[0]]++;
    }
    return 0;
}

/* Copy the rows of x that go to `host`, one a pair, and their slots, into its request. x: [pairs / k] rows. */
void fm_pack(const uint8_t *x, int64_t row_bytes, int pairs, int k, const uint8_t *done, const int32_t *pair_host,
             const int32_t *pair_row, const int32_t *pair_slot, int host, uint8_t *rows, int32_t *slots) {
    for (int p = 0; p < pairs; p++) {
        if ((done && done[p]) || pair_host[p] != host) continue;
        memcpy(rows + pair_row[p] * row_bytes, x + (p / k) * row_bytes, row_bytes);
        slots[pair_row[p]] = pair_slot[p];
    }
}

/* Note where each pair's row of this host's reply lies, and that it is done. */
void fm_collect(int pairs, uint8_t *done, const int32_t *pair_host, const int32_t *pair_row, int host,
                const uint8_t *rows, int64_t row_bytes, const uint8_t **pair_ptr) {
    for (int p = 0; p < pairs; p++) {
        if (done[p] || pair_host[p] != host) continue;
        pair_ptr[p] = rows + pair_row[p] * row_bytes;
        done[p] = 1;
    }
}

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

#define COMBINE(NAME, T, LOAD, STORE)                                                                          \
    CLONES static void NAME(T *restrict out, const T *const *rows, const float *w, int k, int64_t hidden) {    \
        for (int64_t base = 0; base < hidden; base += 256) {                                                   \
            float acc[256];                                                                                    \
            int64_t n = hidden - base < 256 ? hidden - base : 256;                                             \
            const T *r = rows[0] + base;                                                                       \
            for (int64_t i = 0; i < n; i++) acc[i] = w[0] * LOAD(r[i]);                                        \
            for (int s = 1; s < k; s++) {                                                                      \
                r = rows[s] + base;                                                                            \
                for (int64_t i = 0; i < n; i++) acc[i] = __builtin_fmaf(w[s], LOAD(r[i]), acc[i]);             \
            }                                                                                                  \
            for (int64_t i = 0; i < n; i++) out[base + i] = STORE(acc[i]);                                     \
        }                                                                                                      \
    }
#define SAME(v) (v)
#define TO_F16(v) ((_Float16)(v))
#define FROM_F16(v) ((float)(v))
COMBINE(combine_f32, float, SAME, SAME)
COMBINE(combine_bf16, uint16_t, bf16_to_f32, f32_to_bf16)
COMBINE(combine_f16, _Float16, FROM_F16, TO_F16)

/* out[t] = sum over s, in slot order, of weights[t][s] * *pair_ptr[t * k + s]: float32 fused multiply-adds, rounded
 * once to the output's dtype. */
void fm_combine(void *out, int dtype, int tokens, int k, int64_t hidden, const void *const *pair_ptr,
                const float *weights) {
    for (int t = 0; t < tokens; t++) {
        const void *const *rows = pair_ptr + (int64_t)t * k;
        const float *w = weights + (int64_t)t * k;
        if (dtype == F32) combine_f32((float *)out + t * hidden, (const float *const *)rows, w, k, hidden);
        else if (dtype == BF16) combine_bf16((uint16_t *)out + t * hidden, (const uint16_t *const *)rows, w, k, hidden);
        else combine_f16((_Float16 *)out + t * hidden, (const _Float16 *const *)rows, w, k, hidden);
    }
}
