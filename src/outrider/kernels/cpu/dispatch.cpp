#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(OUTRIDER_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace outrider {
namespace {

const KernelTable* levels[5] = {};
std::atomic<const KernelTable*> active{nullptr};

#if defined(OUTRIDER_AMX)
// Whether there are matrix registers, and the system lets us use them: Linux wants to be asked once per process.
bool may_use_amx() {
    constexpr unsigned kBf16Bit = 1u << 22, kTileBit = 1u << 24, kInt8Bit = 1u << 25, kAll = kBf16Bit | kTileBit | kInt8Bit;
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAll) != kAll) return false;
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

void find_levels() {
    int count = 0;
#if defined(OUTRIDER_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
#if defined(OUTRIDER_AMX)
        if (__builtin_cpu_supports("gfni") && may_use_amx()) levels[count++] = &kAmx;
#endif
        levels[count++] = &kAvx512;
    }
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
