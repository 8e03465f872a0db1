// One forward pass of a DialogueModel (model.py) with int8 weights on a CPU. kernel.py compiles it and calls it.
//
// Why it is fast: int8 weights are a quarter of the bytes of float32, and at one token a step the time is the time to
// read the weights; the CPU multiplies int8 four at a time; and the threads meet only five times a layer.
// Why a row's result never depends on its company: every row has its own scale, sums of products are whole numbers
// (their order cannot matter), and every sum of floats is taken in an order fixed by the row itself. No -ffast-math,
// and -ffp-contract=off, so that no compiler may choose another order or rounding in one of two copies of a loop.
//
// Shapes in comments: M rows (tokens) of the step, D width, H heads, K width of a head, F inner width of the
// feed-forward part, V vocabulary; a trailing p means padded with zeros (K to a multiple of HEAD, the others of PANEL).
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Three ways to multiply int8; tests switch the better ones off to hold them against the others.
#if defined(__AVX512VNNI__) && !defined(STUDYTINY_NO_VNNI) && !defined(STUDYTINY_PLAIN)
#include <immintrin.h>
#define VNNI 1
#elif defined(__AVX2__) && !defined(STUDYTINY_PLAIN)
#include <immintrin.h>
#define AVX2 1
#endif
#ifndef VNNI
#define VNNI 0
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
enum { HEAD = 16, PANEL = 64, BLOCK = 32, PHASES = 5 };  // PANEL outputs and at most BLOCK rows are worked on together

// As many numbers as a register of the CPU holds; gcc and clang know how to calculate with these types.
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

typedef struct {
    const int8_t *weights;  // (panels, inputs/4, PANEL, 4); plain: (panels, PANEL, inputs)
    const float *scale;     // (panels * PANEL,): what one unit of that output's weights is worth
    const int32_t *start;   // the same shape: -128 times the sum of its weights, see dot()
    int inputs, panels;
} Matrix;

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *q_gain, *k_gain;  // (K,)
} Layer;

// The work of a phase is cut into units that any thread may claim. Both words carry the step's number in the upper
// half: a thread that the system held up for long finds another number and leaves; nobody ever waits for it.
typedef struct {
    _Alignas(64) _Atomic uint64_t unclaimed;
    _Atomic uint64_t unfinished;
} Phase;

typedef struct {
    struct Kernel *kernel;
    uint8_t *rows;       // (BLOCK, widest): the block of rows at hand, as int8
    float scale[BLOCK];  // what one unit of each of them is worth
    int64_t holds;       // which phase and block they are of
    float *scores;       // (windowp,)
    pthread_t thread;
} Worker;

typedef struct Kernel {
    int d, heads, head, layers, vocab, window, threads;
    int dp, kp, ap, fp, qkv_width;  // padded; ap: H * Kp
    float eps;
    const float *embedding, *cosine, *sine;  // (V, D), (window, K), (window, K)
    Layer *layer;
    Matrix unembed;
    // (slots, layers, H, 2, windowp * Kp) in bfloat16: with many conversations, attention takes the time to read this.
    uint16_t *cache;  // Keys lie as (windowp / LANES, Kp, LANES), values as (windowp, Kp).
    void *cache_memory;
    // One step. All of it is written by the caller before any unit can be claimed.
    int rows, wanted_rows, runs, capacity;
    const int *slot, *position, *wanted;
    int *run;                        // (runs + 1,): first row of each run of rows of one slot
    float *x, *qkv, *mixed, *inner;  // (M, Dp), (M, qkv_width), (M, ap), (M, Fp)
    float *logits;                   // (wanted, V)
    Phase *phase;                    // (layers * PHASES + 1,)
    void *phase_memory;
    // The helpers.
    Worker *worker;  // worker[0] is the caller
    int helpers;
    _Atomic uint32_t step;
    _Atomic int parked, stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} Kernel;

static int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
static void *align(void *memory) { return (void *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

static inline void pause_a_little(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// ---- LANES floats at a time ----
static inline lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, lanes v) { memcpy(p, &v, sizeof v); }

static inline lanes choose(whole mask, lanes yes, lanes no) {
    return (lanes)((mask & (whole)yes) | (~mask & (whole)no));
}

static inline lanes larger(lanes a, lanes b) { return choose(a > b, a, b); }

// bfloat16 is the upper half of a float, rounded to the nearest.
static inline lanes widen(const uint16_t *p) {
    halves v;
    memcpy(&v, p, sizeof v);
    return (lanes)(__builtin_convertvector(v, bits) << 16);
}

static inline uint16_t narrow(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

static float total(lanes v) {  // halves added to halves: one fixed order
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

static float largest(lanes v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// Added to a float, this number pushes the fraction out of the mantissa: what stays in its low bits is x rounded.
#define ROUNDER 12582912.0f

static inline lanes exponential(lanes x) {  // e^x = 2^n e^r with |r| < 0.35, where the series needs six terms
    x = larger(x, (lanes){} - 87.0f);
    x = -larger(-x, (lanes){} - 88.0f);
    lanes shifted = x * 1.44269504f + ROUNDER, n = shifted - ROUNDER;
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    lanes series = ((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r * r + r + 1.0f;
    return (lanes)((bits)series + ((bits)shifted << 23));  // n goes into the exponent
}

// ---- int8 ----
// Writes a row x (n,) as whole numbers of -127..127 and what one of them is worth. RMSNorm only scales the row, so it
// changes nothing but that worth (its gains are folded into the matrix). VNNI wants them unsigned: 128 is added.
static float quantise(const float *x, int n, float norm_size, float eps, uint8_t *out) {
    lanes top = {}, square = {};
    for (int i = 0; i < n; i += LANES) {
        lanes v = load(x + i);
        top = larger(top, (lanes)((bits)v & 0x7fffffffu));
        square += v * v;
    }
    float peak = largest(top), inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    for (int i = 0; i < n; i += LANES) {
        bits q = (bits)(load(x + i) * inverse + ROUNDER);
        bytes b = __builtin_convertvector(q & 255u, bytes) ^ (uint8_t)(VNNI ? 128 : 0);
        memcpy(out + i, &b, sizeof b);
    }
    return norm_size ? peak / 127.0f / __builtin_sqrtf(total(square) / norm_size + eps) : peak / 127.0f;
}

// Sums of products of `count` rows (count, inputs) with one panel of weights -> (count, PANEL). `count` is a constant
// where this is inlined, so all sums live in registers; each weight read serves every row.
static inline __attribute__((always_inline)) void dot_rows(const Matrix *m, int panel, const uint8_t *rows, int count,
                                                           int32_t sums[][PANEL]) {
    const int n = m->inputs;
    const int8_t *w = m->weights + (size_t)panel * PANEL * n;
#if VNNI
    // vpdpbusd multiplies unsigned by signed bytes: (q + 128) w = q w + 128 w, so the sum starts at -128 times sum(w).
    __m512i sum[4][4];
    for (int t = 0; t < 4; t++)
        for (int r = 0; r < count; r++) sum[r][t] = _mm512_loadu_si512(m->start + panel * PANEL + t * LANES);
    for (int i = 0; i < n; i += 4, w += 4 * PANEL) {
        __m512i part[4];
        for (int t = 0; t < 4; t++) part[t] = _mm512_loadu_si512(w + t * 64);
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, rows + (size_t)r * n + i, 4);
            for (int t = 0; t < 4; t++) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], _mm512_set1_epi32(four), part[t]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < 4; t++) _mm512_storeu_si512(sums[r] + t * LANES, sum[r][t]);
#elif defined(AVX2)
    // vpmaddubsw is unsigned by signed too, but its pairs must fit int16: |q| times w with the sign of q always does.
    for (int r = 0; r < count; r++, w = m->weights + (size_t)panel * PANEL * n) {
        __m256i sum[8] = {};
        for (int i = 0; i < n; i += 4, w += 4 * PANEL) {
            int32_t four;
            memcpy(&four, rows + (size_t)r * n + i, 4);
            const __m256i q = _mm256_set1_epi32(four), size = _mm256_abs_epi8(q), ones = _mm256_set1_epi16(1);
            for (int t = 0; t < 8; t++) {
                __m256i pairs = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)(w + t * 32)), q);
                pairs = _mm256_maddubs_epi16(size, pairs);
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(pairs, ones));
            }
        }
        memcpy(sums[r], sum, sizeof sum);
    }
#else
    for (int o = 0; o < PANEL; o++, w += n) {  // a loop that compilers know to vectorise
        int32_t sum[4] = {};
        for (int i = 0; i < n; i++)
            for (int r = 0; r < count; r++) sum[r] += ((const int8_t *)rows)[(size_t)r * n + i] * w[i];
        for (int r = 0; r < count; r++) sums[r][o] = sum[r];
    }
#endif
}

static void dot(const Matrix *m, int panel, const uint8_t *rows, int count, int32_t sums[][PANEL]) {
    if (count == 4) dot_rows(m, panel, rows, 4, sums);
    else if (count == 3) dot_rows(m, panel, rows, 3, sums);
    else if (count == 2) dot_rows(m, panel, rows, 2, sums);
    else dot_rows(m, panel, rows, 1, sums);
}

// ---- the phases of a step ----
enum { QKV, ATTEND, OUT, GATE_UP, DOWN };

static const Matrix *matrix_of(const Kernel *k, int phase) {
    if (phase == k->layers * PHASES) return &k->unembed;
    const Layer *layer = &k->layer[phase / PHASES];
    int kind = phase % PHASES;
    return kind == QKV ? &layer->qkv : kind == OUT ? &layer->out : kind == GATE_UP ? &layer->gate_up : &layer->down;
}

// Once the last layer has stored its keys and values, only the rows whose logits are wanted matter.
static int only_wanted(const Kernel *k, int phase) { return phase > (k->layers - 1) * PHASES + ATTEND; }

static int rows_of(const Kernel *k, int phase) { return only_wanted(k, phase) ? k->wanted_rows : k->rows; }

static int panels_a_unit(const Kernel *k, int phase) {  // few rows: a panel is too little work to claim by itself
    int parts = 4 * k->threads;
    return rows_of(k, phase) >= 4 ? 1 : (matrix_of(k, phase)->panels + parts - 1) / parts;
}

static int units_of(const Kernel *k, int phase) {
    if (phase % PHASES == ATTEND) return k->runs * k->heads;
    int panels = matrix_of(k, phase)->panels, size = panels_a_unit(k, phase);
    return (rows_of(k, phase) + BLOCK - 1) / BLOCK * ((panels + size - 1) / size);
}

// Rows of one block times some panels of the phase's matrix.
static void multiply(Kernel *k, Worker *me, int phase, int unit) {
    const Matrix *m = matrix_of(k, phase);
    const int last = phase == k->layers * PHASES, kind = last ? -1 : phase % PHASES, n = m->inputs;
    const int size = panels_a_unit(k, phase), parts = (m->panels + size - 1) / size;
    const int block = unit / parts, first = block * BLOCK, left = rows_of(k, phase) - first;
    const int count = left < BLOCK ? left : BLOCK, stop = (unit % parts + 1) * size;
    const int *chosen = only_wanted(k, phase) ? k->wanted : NULL;
    const float *input = kind == OUT ? k->mixed : kind == DOWN ? k->inner : k->x;

    // Each thread writes the rows as int8 for itself: cheaper than one more phase, at whose end all would have to wait.
    if (me->holds != ((int64_t)phase << 32 | block)) {
        me->holds = (int64_t)phase << 32 | block;
        for (int r = 0; r < count; r++) {
            size_t row = chosen ? chosen[first + r] : first + r;
            me->scale[r] = quantise(input + row * n, n, input == k->x ? k->d : 0, k->eps, me->rows + (size_t)r * n);
        }
    }
    for (int panel = unit % parts * size; panel < stop && panel < m->panels; panel++)
        for (int r = 0; r < count; r += 4) {
            int32_t sums[4][PANEL];
            int some = count - r < 4 ? count - r : 4;
            dot(m, panel, me->rows + (size_t)r * n, some, sums);
            for (int s = 0; s < some; s++) {
                const int at = panel * PANEL;
                size_t row = chosen ? chosen[first + r + s] : first + r + s;
                float y[PANEL];
                for (int i = 0; i < PANEL; i++) y[i] = (float)sums[s][i] * m->scale[at + i] * me->scale[r + s];
                if (last) {
                    int fits = k->vocab - at < PANEL ? k->vocab - at : PANEL;
                    memcpy(k->logits + (size_t)(first + r + s) * k->vocab + at, y, fits * sizeof *y);
                } else if (kind == QKV) {
                    memcpy(k->qkv + row * k->qkv_width + at, y, sizeof y);
                } else if (kind == GATE_UP) {  // a panel holds 32 outputs of gate, then the same 32 of up
                    for (int i = 0; i < PANEL / 2; i += LANES) {
                        lanes gate = load(y + i), silu = gate / (exponential(-gate) + 1.0f);
                        store(k->inner + row * k->fp + at / 2 + i, silu * load(y + PANEL / 2 + i));
                    }
                } else {  // what attention and feed-forward found is added to the stream
                    for (int i = 0; i < PANEL; i++) k->x[row * k->dp + at + i] += y[i];
                }
            }
        }
}

// RMSNorm of one head with its gain, then `rotate` of model.py; (K,) in place.
static void norm_and_rotate(const Kernel *k, float *x, const float *gain, int position, float factor) {
    lanes square = {};
    for (int i = 0; i < k->kp; i += LANES) square += load(x + i) * load(x + i);
    factor /= __builtin_sqrtf(total(square) / k->head + k->eps);
    const int half = k->head / 2;
    const float *cosine = k->cosine + (size_t)position * k->head, *sine = k->sine + (size_t)position * k->head;
    for (int i = 0; i < half; i++) {
        float a = x[i] * factor * gain[i], b = x[i + half] * factor * gain[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// sum over j of weight[j] * values[j] for `width` x LANES entries; `width` is constant where this is inlined.
static inline __attribute__((always_inline)) void mix(const float *weight, int n, const uint16_t *values, int stride,
                                                      int width, float factor, float *out) {
    lanes sum[4] = {};
    for (int j = 0; j < n; j++)
        for (int c = 0; c < width; c++) sum[c] += widen(values + (size_t)j * stride + c * LANES) * weight[j];
    for (int c = 0; c < width; c++) store(out + c * LANES, sum[c] * factor);
}

// One head of all rows of one conversation: stores their keys and values, then each row looks back.
static void attend(Kernel *k, Worker *me, int layer, int run, int h) {
    const Layer *l = &k->layer[layer];
    const int kp = k->kp, first = k->run[run], stop = k->run[run + 1];
    const size_t size = (size_t)up_to(k->window, LANES) * kp;
    uint16_t *keys = k->cache + (((size_t)k->slot[first] * k->layers + layer) * k->heads + h) * 2 * size;
    uint16_t *values = keys + size;
    for (int row = first; row < stop; row++) {
        const int at = k->position[row];
        float *query = k->qkv + (size_t)row * k->qkv_width + h * kp, *key = query + k->heads * kp;
        norm_and_rotate(k, query, l->q_gain, at, 1.0f / __builtin_sqrtf((float)k->head));
        norm_and_rotate(k, key, l->k_gain, at, 1.0f);
        // LANES keys stand side by side, so that as many scores are computed at once, with no sum within a register.
        uint16_t *key_at = keys + (size_t)(at / LANES) * kp * LANES + at % LANES, *value_at = values + (size_t)at * kp;
        for (int i = 0; i < kp; i++) key_at[i * LANES] = narrow(key[i]);
        for (int i = 0; i < kp; i++) value_at[i] = narrow(key[k->heads * kp + i]);
    }
    whole lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int row = first; row < stop; row++) {
        const int n = k->position[row] + 1;
        const float *query = k->qkv + (size_t)row * k->qkv_width + h * kp;
        float *out = k->mixed + (size_t)row * k->ap + h * kp;
        lanes top = (lanes){} - 1e30f, sum = {};
        for (int j = 0; j < n; j += LANES) {
            const uint16_t *some = keys + (size_t)j * kp;
            lanes score[4] = {};  // four sums: an addition need not wait for the one before it
            for (int i = 0; i < kp; i += 4) {
                // Asks early for keys further on and for the values: the CPU itself foresees only what lies on the same
                // 4 KB page. Saves a quarter of the time of 32 conversations.
                const uint16_t *ahead = some + 2048 + i * LANES, *value = values + (size_t)j * kp + i * LANES;
                __builtin_prefetch(ahead), __builtin_prefetch(value);
                if (LANES == 16) __builtin_prefetch(ahead + 32), __builtin_prefetch(value + 32);
                for (int c = 0; c < 4; c++) score[c] += widen(some + (i + c) * LANES) * query[i + c];
            }
            lanes all = (score[0] + score[1]) + (score[2] + score[3]);
            all = choose(lane < n - j, all, (lanes){} - 1e30f);  // what lies after the row itself is not seen
            top = larger(top, all);
            store(me->scores + j, all);
        }
        const float peak = largest(top);
        for (int j = 0; j < n; j += LANES) {
            lanes weight = exponential(load(me->scores + j) - peak);
            sum += weight;
            store(me->scores + j, weight);
        }
        const float factor = 1.0f / total(sum);
        int c = 0;
        for (; c + 4 * LANES <= kp; c += 4 * LANES) mix(me->scores, n, values + c, kp, 4, factor, out + c);
        for (; c < kp; c += LANES) mix(me->scores, n, values + c, kp, 1, factor, out + c);
    }
}

// ---- threads ----
// What the caller and every helper do in a step: claim units until the phase has none, wait until all are done, go on.
static void work(Kernel *k, Worker *me, uint32_t step) {
    me->holds = -1;
    for (int p = 0; p <= k->layers * PHASES; p++) {
        Phase *phase = &k->phase[p];
        uint64_t seen = atomic_load_explicit(&phase->unclaimed, memory_order_acquire);
        while (seen >> 32 == step && (uint32_t)seen) {
            if (!atomic_compare_exchange_weak(&phase->unclaimed, &seen, seen - 1)) continue;
            int unit = (int)(uint32_t)seen - 1;
            if (p % PHASES == ATTEND) attend(k, me, p / PHASES, unit / k->heads, unit % k->heads);
            else multiply(k, me, p, unit);
            atomic_fetch_sub_explicit(&phase->unfinished, 1, memory_order_acq_rel);
            seen = atomic_load_explicit(&phase->unclaimed, memory_order_acquire);
        }
        for (int spins = 0;;) {
            seen = atomic_load_explicit(&phase->unfinished, memory_order_acquire);
            if (seen >> 32 != step) return;
            if (!(uint32_t)seen) break;
            if (spins < 1000) spins++, pause_a_little();
            else sched_yield();  // more threads than cores: let the one that works run
        }
    }
}

#ifndef SPINS
#define SPINS 2000  // some 50 us
#endif
static void *helper(void *argument) {
    Worker *me = argument;
    Kernel *k = me->kernel;
    for (uint32_t done = 0;;) {
        // In decoding the next step comes soon, and waking a thread takes longer than a layer: look for it a while.
        for (int i = 0; i < SPINS && atomic_load(&k->step) == done && !atomic_load(&k->stop); i++) pause_a_little();
        if (atomic_load(&k->step) == done) {
            pthread_mutex_lock(&k->mutex);
            atomic_fetch_add(&k->parked, 1);
            while (atomic_load(&k->step) == done && !atomic_load(&k->stop)) pthread_cond_wait(&k->wake, &k->mutex);
            atomic_fetch_sub(&k->parked, 1);
            pthread_mutex_unlock(&k->mutex);
        }
        if (atomic_load(&k->stop)) return NULL;
        done = atomic_load(&k->step);
        work(k, me, done);
    }
}

static void wake_helpers(Kernel *k) {
    if (!atomic_load(&k->parked) && !atomic_load(&k->stop)) return;
    pthread_mutex_lock(&k->mutex);
    pthread_cond_broadcast(&k->wake);
    pthread_mutex_unlock(&k->mutex);
}

// ---- what kernel.py calls ----
int kernel_packing(void) {  // whether weights are (panels, inputs/4, PANEL, 4)
#ifdef AVX2
    return 1;
#else
    return VNNI;
#endif
}

void kernel_free(Kernel *k) {
    if (!k) return;
    atomic_store(&k->stop, 1);
    wake_helpers(k);
    for (int i = 1; i <= k->helpers; i++) pthread_join(k->worker[i].thread, NULL);
    for (int i = 0; k->worker && i < k->threads; i++) free(k->worker[i].rows), free(k->worker[i].scores);
    pthread_cond_destroy(&k->wake);
    pthread_mutex_destroy(&k->mutex);
    free(k->worker), free(k->layer), free(k->cache_memory), free(k->phase_memory);
    free(k->run), free(k->x), free(k->qkv), free(k->mixed), free(k->inner), free(k);
}

static const void **take(Matrix *m, const void **p, int inputs, int outputs) {
    *m = (Matrix){p[0], p[1], p[2], inputs, outputs / PANEL};
    return p + 3;
}

// `sizes`: d, heads, layers, ff, vocab, window, slots, threads. `p`: embedding, cosine, sine, then weights, scale and
// start of unembed and of each layer's qkv, out, gate_up, down, with q_gain and k_gain after each layer; all are kept
// alive by the caller. NULL when there is not enough memory.
Kernel *kernel_new(const int *sizes, float eps, const void **p) {
    Kernel *k = calloc(1, sizeof *k);
    if (!k) return NULL;
    k->d = sizes[0], k->heads = sizes[1], k->layers = sizes[2], k->vocab = sizes[4], k->window = sizes[5];
    k->threads = sizes[7], k->eps = eps, k->head = k->d / k->heads;
    k->dp = up_to(k->d, PANEL), k->kp = up_to(k->head, HEAD), k->fp = up_to(sizes[3], PANEL);
    k->ap = up_to(k->heads * k->kp, PANEL), k->qkv_width = up_to(3 * k->heads * k->kp, PANEL);
    pthread_mutex_init(&k->mutex, NULL);
    pthread_cond_init(&k->wake, NULL);
    const size_t entries = (size_t)sizes[6] * k->layers * k->heads * 2 * up_to(k->window, LANES) * k->kp;
    // calloc, because then a page costs memory only once it is written.
    k->cache_memory = calloc(entries * sizeof *k->cache + 64, 1);
    k->phase_memory = calloc(k->layers * PHASES + 2, sizeof(Phase));
    k->layer = calloc(k->layers, sizeof *k->layer);
    k->worker = calloc(k->threads, sizeof *k->worker);
    int widest = k->ap > k->dp ? k->ap : k->dp, complete = k->cache_memory && k->phase_memory && k->layer && k->worker;
    if (k->fp > widest) widest = k->fp;
    for (int i = 0; complete && i < k->threads; i++) {
        k->worker[i].kernel = k;
        k->worker[i].rows = malloc((size_t)BLOCK * widest);
        k->worker[i].scores = malloc(up_to(k->window, LANES) * sizeof(float));
        complete = k->worker[i].rows && k->worker[i].scores;
    }
    if (!complete) return kernel_free(k), NULL;
    k->cache = align(k->cache_memory), k->phase = align(k->phase_memory);
    k->embedding = *p++, k->cosine = *p++, k->sine = *p++;
    p = take(&k->unembed, p, k->dp, up_to(k->vocab, PANEL));
    for (Layer *l = k->layer; l < k->layer + k->layers; l++) {
        p = take(&l->qkv, p, k->dp, k->qkv_width);
        p = take(&l->out, p, k->ap, k->dp);
        p = take(&l->gate_up, p, k->dp, 2 * k->fp);
        p = take(&l->down, p, k->fp, k->dp);
        l->q_gain = *p++, l->k_gain = *p++;
    }
    // A helper that cannot be started is no fault: the others do its share.
    for (int i = 1; i < k->threads; i++, k->helpers++)
        if (pthread_create(&k->worker[i].thread, NULL, helper, &k->worker[i])) break;
    return k;
}

static int grow(float **memory, size_t entries) {  // zeroed: entries that are only padding are never written
    free(*memory);
    return (*memory = calloc(entries, sizeof(float))) != NULL;
}

// Row r is token ids[r] of conversation slot[r] at position[r]; rows of one slot stand together. Writes (wanted, V).
// Returns -1 when there is not enough memory.
int kernel_step(Kernel *k, int rows, const int *ids, const int *slot, const int *position, int wanted_rows,
                const int *wanted, float *logits) {
    if (rows > k->capacity) {
        const size_t n = up_to(rows, BLOCK);
        k->capacity = 0;
        free(k->run);
        k->run = malloc((n + 1) * sizeof *k->run);
        if (!k->run || !grow(&k->x, n * k->dp) || !grow(&k->qkv, n * k->qkv_width) || !grow(&k->mixed, n * k->ap) ||
            !grow(&k->inner, n * k->fp)) return -1;
        k->capacity = n;
    }
    k->rows = rows, k->slot = slot, k->position = position, k->runs = 0;
    k->wanted_rows = wanted_rows, k->wanted = wanted, k->logits = logits;
    for (int r = 0; r < rows; r++) {
        if (r == 0 || slot[r] != slot[r - 1]) k->run[k->runs++] = r;
        memcpy(k->x + (size_t)r * k->dp, k->embedding + (size_t)ids[r] * k->d, k->d * sizeof *k->x);
    }
    k->run[k->runs] = rows;
    const uint32_t step = atomic_load(&k->step) + 1;
    for (int p = 0; p <= k->layers * PHASES; p++) {
        uint64_t tickets = (uint64_t)step << 32 | (uint32_t)units_of(k, p);
        atomic_store_explicit(&k->phase[p].unfinished, tickets, memory_order_release);
        atomic_store_explicit(&k->phase[p].unclaimed, tickets, memory_order_release);
    }
    atomic_store(&k->step, step);
    wake_helpers(k);
    work(k, &k->worker[0], step);
    return 0;
}

// ---- choosing ----
enum { MOST_TOP = 256 };
typedef struct {
    float value;
    int64_t id;
} Entry;

// Falling order. n is small, and all but the last few entries are in order already.
static void sort_entries(Entry *e, int n) {
    for (int i = 1; i < n; i++) {
        Entry moved = e[i];
        int at = i;
        for (; at && e[at - 1].value < moved.value; at--) e[at] = e[at - 1];
        e[at] = moved;
    }
}

// Some number that at least k of the n numbers exceed, and not many more. The numbers are dealt to GROUPS x LANES hands;
// where k hands hold one above a number, so do k numbers. Halving finds such a number near the highest.
static float exceeded_by(const float *p, int n, int k) {
    enum { GROUPS = 8, ROUNDS = 14 };
    const float none = -__builtin_inff();
    lanes best[GROUPS];
    for (int g = 0; g < GROUPS; g++) best[g] = (lanes){} + none;
    for (int i = 0; i + GROUPS * LANES <= n; i += GROUPS * LANES)
        for (int g = 0; g < GROUPS; g++) best[g] = larger(best[g], load(p + i + g * LANES));
    float high = none;
    for (int g = 0; g < GROUPS; g++) high = largest(best[g]) > high ? largest(best[g]) : high;
    float low = high - 30.0f, middle = low;
    for (int round = 0; round <= ROUNDS; round++) {
        whole above = {};
        for (int g = 0; g < GROUPS; g++) above -= best[g] > middle;  // true is -1
        int count = 0;
        for (int j = 0; j < LANES; j++) count += above[j];
        if (count >= k) low = middle;
        else if (round == 0) return none;
        else high = middle;
        middle = low + (high - low) / 2;
    }
    return low;
}

// The k <= MOST_TOP largest of each row of (rows, vocab) in falling order -> values, ids (rows, k). Nearly all numbers
// are only compared with one that k others exceed: a guess at first, then the smallest of the k largest so far.
void kernel_top(const float *logits, int rows, int vocab, int k, float *values, int64_t *ids) {
    const int room = k + k / 4;  // sorted when so many have gathered
    for (int r = 0; r < rows; r++, logits += vocab, values += k, ids += k) {
        Entry best[MOST_TOP + MOST_TOP / 4 + 1];
        float least = exceeded_by(logits, vocab, k);
        int n = 0;
        for (int i = 0; i < vocab; i += 4 * LANES) {
            const int some = vocab - i < 4 * LANES ? vocab - i : 4 * LANES;
            if (some == 4 * LANES) {
                const float *p = logits + i;
                const whole above = (load(p) > least) | (load(p + LANES) > least) | (load(p + 2 * LANES) > least) |
                                    (load(p + 3 * LANES) > least);
                uint64_t pairs[LANES / 2], any = 0;
                memcpy(pairs, &above, sizeof pairs);
                for (int j = 0; j < LANES / 2; j++) any |= pairs[j];
                if (!any) continue;
            }
            for (int j = 0; j < some; j++) {
                if (!(logits[i + j] > least)) continue;
                best[n++] = (Entry){logits[i + j], i + j};
                if (n > room) {
                    sort_entries(best, n);
                    n = k, least = best[k - 1].value;
                }
            }
        }
        sort_entries(best, n);
        for (int i = 0; i < k; i++) {
            values[i] = i < n ? best[i].value : -__builtin_inff();
            ids[i] = i < n ? best[i].id : 0;
        }
    }
}
