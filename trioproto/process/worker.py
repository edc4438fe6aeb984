"""What a supervisor starts as a worker: ``python -P .../worker.py op ...`` is ``python -m trioproto op ...``, safely.

``-m`` has Python import from the directory in which it is started, before all others: a ``trio.py`` there would run in
every worker. ``-P`` prevents that, but then a package that lies in that very directory, as in a clone, is not found
either. So this takes the package that it belongs to from where it lies itself, and nothing else from there.
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
