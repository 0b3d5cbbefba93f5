"""`python -m cddlib`."""

import sys

from cddlib.cli import main

sys.exit(main())
