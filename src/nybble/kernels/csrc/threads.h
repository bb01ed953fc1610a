// The team of threads of a parallel region, with or without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nybble::NYBBLE_ISA {

// Most threads of the next parallel region.
inline int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Within a region: threads there are, and which of them this is.
inline int num_threads() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace nybble::NYBBLE_ISA
