"""Run a module with plugins: `python -m vlmbuild.builder.with_plugins NAME,NAME MODULE ARGUMENTS`."""

from __future__ import annotations

import runpy
import sys

from vlmbuild.builder.plugins import use_plugins

if __name__ == "__main__":
    names, *sys.argv = sys.argv[1:]
    use_plugins(*names.split(","))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
