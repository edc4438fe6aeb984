"""The program of a worker: ``python -P .../worker.py op ...`` is a safe ``python -m trioproto op ...``.

With ``-m``, Python imports from the current directory before all others: a ``trio.py`` there would run in every worker.
``-P`` prevents that, but then the package is not found if it is in the current directory, as in a clone. So this loads
the package from its own location, and nothing else from there.
"""

import importlib.machinery
import importlib.util
import runpy
import sys
from pathlib import Path

spec = importlib.machinery.PathFinder.find_spec("trioproto", [str(Path(__file__).parents[2])])
assert spec is not None  # noqa: S101 - it holds this file
assert spec.loader is not None  # noqa: S101
sys.modules["trioproto"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("trioproto", run_name="__main__", alter_sys=True)
