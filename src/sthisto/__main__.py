"""``python -m sthisto`` is the command line."""

import sys

from sthisto.cli import main

sys.exit(main())
