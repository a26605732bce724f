"""``python -m muybridge``, and the console script."""

import sys

from muybridge.cli.front import main

if __name__ == "__main__":
    sys.exit(main())
