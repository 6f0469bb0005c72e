"""Benchmark scripts in the process of the test, for tests of what they write."""

import io
import json
import sys
from contextlib import redirect_stdout
from importlib import import_module
from unittest.mock import patch

from benchmarks import common


def answer_here(module, request, threads, patience, heard=False):
    """What ``common.answer`` returns, without a process and its imports; how many threads it has, a process tells."""
    if "bandwidth" in request:
        return common.answer(module, request, threads, patience, heard)
    with patch.object(sys, "argv", [module, json.dumps(request)]), redirect_stdout(io.StringIO()) as said:
        import_module(module).main()
    return json.loads(said.getvalue().splitlines()[-1])
