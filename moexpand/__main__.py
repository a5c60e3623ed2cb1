"""`python -m moexpand` is the `moexpand` command."""

import sys

from moexpand.cli import main

if __name__ == "__main__":
    sys.exit(main())
