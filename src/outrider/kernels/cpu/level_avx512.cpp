#define OUTRIDER_LEVEL avx512

#include "tiles_avx512.h"

#include "level.h"

namespace outrider {
extern const KernelTable kAvx512 = avx512::table("avx512");
}
