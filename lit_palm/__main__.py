"""`python -m lit_palm`: the same as `lit-palm`."""

import sys

from lit_palm.cli import main

if __name__ == "__main__":
    sys.exit(main())
