// Jobs of several stages on many matrices, each stage of independent tasks, for a parallel region of the caller.
//
// Included once per source file after strips.hpp, inside the same namespace.
//
// A job has kStages, tasks(stage) of every matrix, run(stage, matrix, task, place, scratch), and scratch_size(). What the stages of
// a matrix leave for each other is handed out by slot(place).

constexpr int64_t kManyEach = 4;  // matrices per thread from which on nobody shares one

// Memory, handed out in numbers of float64 from multiples of 64 bytes on; without any, only the numbers are counted.
struct Place {
    double *start;
    int64_t taken = 0;
    double *take(int64_t numbers) {
        double *const here = start ? start + taken : nullptr;
        taken += padded(numbers);
        return here;
    }
};

// A slot for every matrix under way and a scratch for every thread, in numbers of float64.
struct Stages {
    int64_t threads, slot = 0, scratch = 0;
    int64_t size() const { return threads * (slot + scratch); }
    template <class Job>
    void make_room(const Job &job) {
        Place place = {nullptr};
        job.slot(place);
        slot = larger(slot, place.taken);
        scratch = larger(scratch, padded(job.scratch_size()));
    }
};

// All stages of all items: each by one thread alone, or, where there are few, a stage after the other by all of them.
template <class Job>
void work(const Job &job, const int64_t *items, int64_t count, const Stages &stages, double *start) {
    double *const scratch = start + stages.threads * stages.slot + omp_get_thread_num() * stages.scratch;
    if (count >= kManyEach * stages.threads || stages.threads == 1) {
        double *const slot = start + omp_get_thread_num() * stages.slot;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < count; ++n)
            for (int stage = 0; stage < Job::kStages; ++stage)
                for (int64_t task = 0; task < job.tasks(stage); ++task) job.run(stage, items ? items[n] : n, task, {slot}, scratch);
        return;
    }
    for (int64_t begin = 0; begin < count; begin += stages.threads) {
        const int64_t wave = smaller(stages.threads, count - begin);
        for (int stage = 0; stage < Job::kStages; ++stage) {
            const int64_t tasks = job.tasks(stage);
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < wave * tasks; ++t) {
                const int64_t n = begin + t / tasks;
                job.run(stage, items ? items[n] : n, t % tasks, {start + (n - begin) * stages.slot}, scratch);
            }
        }
    }
}
