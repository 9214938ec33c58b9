"""The command line: ``python -m parallel_backend``."""

import sys

from .cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
