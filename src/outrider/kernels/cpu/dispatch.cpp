#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace outrider {
namespace {

const KernelTable* levels[4] = {};
std::atomic<const KernelTable*> active{nullptr};

void find_levels() {
    int count = 0;
#if defined(OUTRIDER_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        levels[count++] = &kAvx512;
    if (avx2) levels[count++] = &kAvx2;
#endif
    levels[count++] = &kPortable;
    active = levels[0];
}

}  // namespace

const KernelTable* const* available_levels() {
    static const bool found = (find_levels(), true);
    (void)found;
    return levels;
}

const KernelTable& active_level() {
    available_levels();
    return *active.load(std::memory_order_relaxed);
}

bool select_level(const char* name) {
    for (const KernelTable* const* level = available_levels(); *level != nullptr; ++level) {
        if (std::strcmp((*level)->name, name) == 0) {
            active = *level;
            return true;
        }
    }
    return false;
}

}  // namespace outrider
