"""Disjoint sets of numbers, each known by its root: the one step that all users share, compiled by numba."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def find_root(parents: np.ndarray, member: int) -> int:
    """The root of the set of a member; `parents` [n] integers, which lead to it, are made shorter on the way.

    A root is its own parent. Source: Tarjan and van Leeuwen, Worst-case analysis of set union algorithms, JACM 1984.
    """
    while parents[member] != member:
        parents[member] = parents[parents[member]]
        member = parents[member]
    return member
