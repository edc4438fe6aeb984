"""``python -m trioproto``."""

import sys

from trioproto.cli.main import main

sys.exit(main())
