#!/bin/sh
# The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#     scripts/sanitize_kernels.sh                           the kernels' tests, slow ones too: some minutes
#     scripts/sanitize_kernels.sh tests/parity -k native    instead, whatever pytest is told here
#
# PYTHON is an interpreter with outrider's `dev` extra, by default .venv/bin/python; it is what `make install` makes.
# Needs g++ (another GCC through CXX) with its sanitizers and make; nanobind and cmake come from PyPI where they are
# missing. The sanitized build goes to a copy of the package in a temporary folder: the checkout is not changed.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
compiler=${CXX:-g++}
found=$(command -v "$python") || { echo "$0: no $python; run 'make install' or set PYTHON" >&2; exit 2; }
python=$(cd "$(dirname "$found")" && pwd)/$(basename "$found")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT INT TERM

# The build's own tools, which an installed outrider no longer needs, beside the interpreter's packages.
tools=$scratch/tools
"$python" -c 'import nanobind' 2>/dev/null || "$python" -m pip install --quiet --target "$tools" 'nanobind>=2.4'
PYTHONPATH=$tools${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
if ! command -v cmake >/dev/null; then
    "$python" -m pip install --quiet --target "$tools" cmake
    PATH=$tools/bin:$PATH
fi

{
    cmake -S "$root" -B "$scratch/build" -DOUTRIDER_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        "-DCMAKE_CXX_COMPILER=$compiler" "-DPython_EXECUTABLE=$python" &&
        cmake --build "$scratch/build" --parallel
} >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }

mkdir "$scratch/src"
cp -R "$root/src/outrider" "$scratch/src/outrider"
rm -f "$scratch"/src/outrider/kernels/_native.*
cp "$scratch"/build/_native.* "$scratch/src/outrider/kernels/"

# Python itself has no sanitizer in it, so their libraries come first; it keeps memory to its end, which is no leak.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export ASAN_OPTIONS UBSAN_OPTIONS OMP_NUM_THREADS

[ $# -gt 0 ] || set -- tests/parity/test_native_linear.py tests/parity/test_native_attention.py tests/parity/test_native_drafting.py \
    tests/parity/test_native_choice.py tests/parity/test_lean_path.py tests/unit/test_top_tokens.py
cd "$root"
# An editable install has a finder of its own that comes before every path: the copy is put before that.
LD_PRELOAD=$LD_PRELOAD "$python" -c '
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
import pytest
from outrider.kernels import _native
assert _native.__file__.startswith(sys.argv[1]), _native.__file__
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[3:]]))
' "$scratch/src" "$root" "$@"
