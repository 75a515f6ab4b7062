#define OUTRIDER_LEVEL amx

#include "tiles_avx512.h"

#include "matrices_amx.h"

#include "level.h"

namespace outrider {
extern const KernelTable kAmx = amx::table("amx");
}
