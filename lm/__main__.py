"""`python -m lm`, the same as `lm`."""

import sys

from lm.cli import main

sys.exit(main())
