"""``python -m trioproto``."""

import sys

from trioproto.cli import main

sys.exit(main())
