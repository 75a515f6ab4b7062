// What goes between Python and the compiled code of drafting.
#pragma once

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "paths.h"

namespace outrider {

namespace nb = nanobind;

using Address = uint64_t;
template <class T>
using Row = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Rows = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The numbers [first, end) of any sequence; of a list or a tuple without a copy of it.
template <class T>
std::vector<T> numbers_between(nb::handle sequence, int64_t first, int64_t end) {
    end = std::max<int64_t>(end, 0);
    const bool is_fast = PyList_Check(sequence.ptr()) || PyTuple_Check(sequence.ptr());
    nb::object part = nb::borrow(sequence);
    if (!is_fast) {
        part = nb::steal(PySequence_GetSlice(sequence.ptr(), first, end));
        if (!part.is_valid()) throw nb::python_error();
        end -= first;
        first = 0;
    }
    const nb::object fast = nb::steal(PySequence_Fast(part.ptr(), "a sequence of numbers"));
    if (!fast.is_valid()) throw nb::python_error();
    end = std::min<int64_t>(end, PySequence_Fast_GET_SIZE(fast.ptr()));
    first = std::clamp<int64_t>(first, 0, end);
    PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
    std::vector<T> found;
    found.reserve(end - first);
    for (int64_t i = first; i < end; ++i) found.push_back(nb::cast<T>(nb::handle(items[i])));
    return found;
}

template <class T>
std::vector<T> numbers(nb::handle sequence, int64_t most) {
    return numbers_between<T>(sequence, 0, most);
}

template <class T>
std::vector<T> last_numbers(nb::handle sequence, int64_t count) {
    const int64_t size = static_cast<int64_t>(nb::len(sequence));
    return numbers_between<T>(sequence, std::max<int64_t>(size - count, 0), size);
}

template <class T>
nb::list as_list(const std::vector<T>& values) {
    nb::object made = nb::steal(PyList_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t i = 0; i < values.size(); ++i) PyList_SET_ITEM(made.ptr(), i, nb::cast(values[i]).release().ptr());
    return nb::borrow<nb::list>(made);
}

template <class T>
nb::tuple as_tuple(const std::vector<T>& values) {
    nb::object made = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t i = 0; i < values.size(); ++i) PyTuple_SET_ITEM(made.ptr(), i, nb::cast(values[i]).release().ptr());
    return nb::borrow<nb::tuple>(made);
}

inline std::vector<WeightedPath> read_paths(nb::handle paths, int64_t most) {
    std::vector<WeightedPath> found;
    for (nb::handle path : paths) {
        WeightedPath& made = found.emplace_back();
        made.tokens = numbers<int64_t>(path[0], most);
        made.confidences = numbers<double>(path[1], static_cast<int64_t>(made.tokens.size()));
        if (made.confidences.size() < made.tokens.size()) throw std::invalid_argument("a path with too few confidences");
    }
    return found;
}

inline nb::list as_pairs(const std::vector<WeightedPath>& paths) {
    nb::list pairs;
    for (const WeightedPath& path : paths) pairs.append(nb::make_tuple(as_list(path.tokens), as_list(path.confidences)));
    return pairs;
}

}  // namespace outrider
