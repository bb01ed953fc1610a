// How one kernel source becomes several bodies and one exported function.
//
// Every kernel file is compiled once per instruction set, with NYBBLE_ISA set to `portable`, `avx2`, `avx512` or
// `avx512bf16`, those that multiply by matrix tiles for `amx` too, and the matching -m flags (CMakeLists.txt). It puts
// its code in that namespace and ends with its entry:
//
//     namespace nybble::NYBBLE_ISA {
//     void scale(const float* x, float* y, int64_t n) { ... }
//     }
//     NYBBLE_ENTRY(scale, (const float* x, float* y, int64_t n), (x, y, n))
//
// NYBBLE_ENTRY exports `extern "C" nybble_scale`, which calls the body for `nybble::current_isa()`; where that is `amx`,
// NYBBLE_ENTRY the body of `avx512bf16`, NYBBLE_AMX_ENTRY that of `amx`. They expand to something in one of the
// compilations only. Two rules keep the bodies apart: everything a kernel file defines stays in
// `nybble::NYBBLE_ISA` (an inline function shared between two compilations would be merged by the linker, and the
// portable body could then execute AVX-512), and no std:: function template is called from a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#define NYBBLE_EXPORT __attribute__((visibility("default")))

namespace nybble {

// In ascending order: a machine that has one has all those before it.
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, AMX = 4 };

// The set in use: the best that this machine has, or a lower one that was asked for (nybble_cpu_set_isa).
Isa current_isa();

// Memory for a kernel's own use, aligned to 64 bytes, to be freed; asked for outside parallel regions. nullptr where
// there is none: the kernel returns at once, and its caller learns why from nybble_cpu_ran_out_of_memory.
void* allocate_scratch(size_t bytes);

}  // namespace nybble

#if !defined(NYBBLE_ENTRY_HERE)
#define NYBBLE_ENTRY(name, parameters, arguments)
#define NYBBLE_AMX_ENTRY(name, parameters, arguments)
#elif defined(NYBBLE_X86_BODIES)
#define NYBBLE_ENTRY_WITH(tiles, name, parameters, arguments)                      \
    namespace nybble::avx2 { void name parameters; }                               \
    namespace nybble::avx512 { void name parameters; }                             \
    namespace nybble::avx512bf16 { void name parameters; }                         \
    namespace nybble::tiles { void name parameters; }                              \
    extern "C" NYBBLE_EXPORT void nybble_##name parameters {                       \
        switch (nybble::current_isa()) {                                           \
            case nybble::AMX: return nybble::tiles::name arguments;                \
            case nybble::AVX512BF16: return nybble::avx512bf16::name arguments;    \
            case nybble::AVX512: return nybble::avx512::name arguments;            \
            case nybble::AVX2: return nybble::avx2::name arguments;                \
            case nybble::PORTABLE: return nybble::portable::name arguments;        \
        }                                                                          \
    }
#define NYBBLE_ENTRY(name, parameters, arguments) NYBBLE_ENTRY_WITH(avx512bf16, name, parameters, arguments)
#if defined(NYBBLE_AMX_BODIES)
#define NYBBLE_AMX_ENTRY(name, parameters, arguments) NYBBLE_ENTRY_WITH(amx, name, parameters, arguments)
#else
#define NYBBLE_AMX_ENTRY(name, parameters, arguments) NYBBLE_ENTRY_WITH(avx512bf16, name, parameters, arguments)
#endif
#else
#define NYBBLE_ENTRY(name, parameters, arguments) \
    extern "C" NYBBLE_EXPORT void nybble_##name parameters { return nybble::portable::name arguments; }
#define NYBBLE_AMX_ENTRY NYBBLE_ENTRY
#endif
