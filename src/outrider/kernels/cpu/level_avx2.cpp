#define OUTRIDER_LEVEL avx2

#include "tiles_avx2.h"

#include "level.h"

namespace outrider {
extern const KernelTable kAvx2 = avx2::table("avx2");
}
