"""Run the command line as ``python -m mctd_diffusers``."""

import sys

from mctd_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main())
