"""Memory that is freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.allocator import return_freed_memory, settle_allocator
from compress.measure.memory import resident_bytes

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")


ALONE = """
import torch
from compress.allocator import settle_allocator
from compress.measure.memory import resident_bytes

settle_allocator()
torch.ones(6 << 20)  # by itself, glibc would keep on the heap what is smaller than this from now on
before = resident_bytes()
tensor = torch.ones(4 << 20)
assert resident_bytes() - before > 15 << 20
del tensor
assert resident_bytes() - before < 4 << 20
"""


def test_a_freed_tensor_leaves_memory_though_a_larger_one_was_freed_before() -> None:
    """In a process of its own: a heap that others have used may have a hole as large as the tensor."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_holes_of_the_heap_are_given_back() -> None:
    settle_allocator()
    return_freed_memory()
    before = resident_bytes()
    pieces = [torch.ones(1 << 17) for _ in range(64)]  # half a MiB each
    assert resident_bytes() - before > 24 << 20
    keep = pieces[-1]
    del pieces
    return_freed_memory()
    assert resident_bytes() - before < 8 << 20
    assert keep[0] == 1
