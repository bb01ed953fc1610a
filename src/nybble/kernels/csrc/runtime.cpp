// What the library says about itself, and the choice of body. Compiled once, for any machine.
#include <atomic>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(NYBBLE_AMX_BODIES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "dispatch.h"

namespace nybble {

// Whether the processor has matrix tiles of bf16, and the kernel lets this process use them: it keeps no room for their
// 8 KB a thread until it is asked (Linux's Documentation/arch/x86/xstate.rst).
[[maybe_unused]] static bool may_use_amx() {
#if defined(NYBBLE_AMX_BODIES)
    unsigned a, b, c, d;
    constexpr unsigned kTileBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileBits) != kTileBits) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

static Isa find_best_isa() {
#ifdef NYBBLE_X86_BODIES
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
    return may_use_amx() ? AMX : AVX512BF16;
#else
    return PORTABLE;
#endif
}

static Isa best_isa() {
    static const Isa best = find_best_isa();
    return best;
}

static std::atomic<int>& chosen_isa() {
    static std::atomic<int> chosen{best_isa()};
    return chosen;
}

Isa current_isa() { return Isa(chosen_isa().load(std::memory_order_relaxed)); }

// Of the thread that called the kernel: several may be in kernels at once.
static thread_local bool ran_out_of_memory = false;

void* allocate_scratch(size_t bytes) {
    void* memory = aligned_alloc(64, (bytes / 64 + 1) * 64);  // never of no bytes, for which nullptr is no failure
    ran_out_of_memory = ran_out_of_memory || !memory;
    return memory;
}

}  // namespace nybble

extern "C" {

// Raised whenever a signature changes; backends/cpp/library.py refuses a library of another number.
NYBBLE_EXPORT int nybble_cpu_abi() { return 7; }

NYBBLE_EXPORT int nybble_cpu_best_isa() { return nybble::best_isa(); }
NYBBLE_EXPORT int nybble_cpu_isa() { return nybble::current_isa(); }

// Returns the set now in use: `isa`, or the best there is where that is lower.
NYBBLE_EXPORT int nybble_cpu_set_isa(int isa) {
    const int best = nybble::best_isa();
    nybble::chosen_isa().store(isa < 0 ? 0 : isa > best ? best : isa);
    return nybble::current_isa();
}

// Threads that the next parallel region will have: follows torch.set_num_threads when the pool is torch's.
NYBBLE_EXPORT int nybble_cpu_num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Whether a kernel that this thread called since it last asked could not allocate its scratch memory and did nothing.
NYBBLE_EXPORT int nybble_cpu_ran_out_of_memory() {
    const bool answer = nybble::ran_out_of_memory;
    nybble::ran_out_of_memory = false;
    return answer;
}

NYBBLE_EXPORT const char* nybble_cpu_compiler() { return __VERSION__; }

}
