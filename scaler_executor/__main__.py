"""`python -m scaler_executor`: the same as the command `scaler-executor`."""

import sys

from scaler_executor.cli import main

if __name__ == "__main__":
    sys.exit(main())
