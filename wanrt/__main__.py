"""`python -m wanrt` does what the command `wanrt` does."""

import sys

from wanrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
