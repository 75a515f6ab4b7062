// Which level of the kernel table runs.
#pragma once

#include "kernel_table.h"

namespace outrider {

// Levels that this processor can run, the fastest first; null ends the list.
const KernelTable* const* available_levels();
const KernelTable& active_level();
// False if this processor has no such level.
bool select_level(const char* name);

}  // namespace outrider
