"""``python -m dgal_bench`` is the console script ``dgal-bench``."""

import sys

from dgal_bench.cli.main import main

sys.exit(main())
