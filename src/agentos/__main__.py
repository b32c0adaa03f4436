"""`python -m agentos`."""

import sys

from agentos.cli import main

if __name__ == "__main__":
    sys.exit(main())
