"""`python -m vlafit`, and `accelerate launch -m vlafit`."""

import sys

from vlafit.cli import main

if __name__ == "__main__":
    sys.exit(main())
