"""`python -m pacevlm` is the command `pacevlm`."""

import sys

from pacevlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
