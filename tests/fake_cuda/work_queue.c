/* All streams as one: one worker thread per process does queued work in order, FAKE_CUDA_ASYNC_MS
 * late. A caller that forgets to synchronise is thus caught by a test instead of by a user. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct work {
    struct work *next;
    unsigned char *target;
    const unsigned char *source; /* NULL: set to value, or to the word */
    unsigned char value;
    int is_word;
    uint32_t word;
    size_t bytes;
    uint64_t delay_ms;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct work *first, **last = &first;
static uint64_t enqueued, finished;
static int running;

static void *serve(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!first)
            pthread_cond_wait(&changed, &lock);
        struct work *work = first;
        first = work->next;
        if (!first)
            last = &first;
        pthread_mutex_unlock(&lock);
        struct timespec delay = {.tv_sec = (time_t)(work->delay_ms / 1000),
                                 .tv_nsec = (long)(work->delay_ms % 1000) * 1000000};
        nanosleep(&delay, NULL);
        if (work->source)
            memmove(work->target, work->source, work->bytes);
        else if (work->is_word)
            __atomic_store_n((uint32_t *)work->target, work->word, __ATOMIC_RELEASE);
        else
            memset(work->target, work->value, work->bytes);
        free(work);
        pthread_mutex_lock(&lock);
        finished++;
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static int start(void)
{
    if (running)
        return OK;
    /* Python's signal handlers belong to the main thread. */
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, NULL, serve, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return OPERATING_SYSTEM;
    pthread_detach(thread);
    running = 1;
    return OK;
}

static int enqueue(struct work job)
{
    struct work *work = malloc(sizeof *work);
    if (!work)
        return OPERATING_SYSTEM;
    *work = job;
    work->delay_ms = setting("FAKE_CUDA_ASYNC_MS", 0);
    pthread_mutex_lock(&lock);
    int code = start();
    if (!code) {
        *last = work;
        last = &work->next;
        enqueued++;
        pthread_cond_broadcast(&changed);
    } else {
        free(work);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int work_enqueue_set(unsigned char *target, unsigned char value, size_t bytes)
{
    return enqueue((struct work){.target = target, .value = value, .bytes = bytes});
}

int work_enqueue_word(unsigned char *target, uint32_t word)
{
    return enqueue((struct work){.target = target, .is_word = 1, .word = word});
}

int work_enqueue_copy(unsigned char *target, const unsigned char *source, size_t bytes)
{
    return enqueue((struct work){.target = target, .source = source, .bytes = bytes});
}

void work_wait(void)
{
    pthread_mutex_lock(&lock);
    uint64_t until = enqueued;
    while (finished < until)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}
