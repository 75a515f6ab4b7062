#define OUTRIDER_LEVEL portable

#include "tiles_portable.h"

#include "level.h"

namespace outrider {
extern const KernelTable kPortable = portable::table("portable");
}
