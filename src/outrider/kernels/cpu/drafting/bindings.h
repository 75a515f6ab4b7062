// Binds what drafting computes natively to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace outrider {

void bind_drafting(nanobind::module_& m);
void bind_draft_sources(nanobind::module_& m);  // bindings_sources.cpp
void bind_recycling(nanobind::module_& m);      // bindings_recycling.cpp

}  // namespace outrider
