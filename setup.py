"""The CPU kernel is compiled where there is a compiler; a machine without one goes without it."""

import sys
from pathlib import Path

from setuptools import Extension, setup

flags = ["-O3", "-std=c++17", "-fopenmp"] if sys.platform.startswith("linux") else ["-O3", "-std=c++17"]
# OpenMP's runtime is torch's own copy, found by its name once torch is loaded.
links = ["-fopenmp"] if sys.platform.startswith("linux") else []
setup(
    ext_modules=[
        Extension(
            "compress.nn._cpu",
            ["compress/nn/cpu.cpp"],
            depends=sorted(str(header) for header in Path("compress/nn").glob("*.h")),
            extra_compile_args=flags,
            extra_link_args=links,
            optional=True,
        )
    ]
)
