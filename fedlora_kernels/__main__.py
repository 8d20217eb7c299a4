"""``python -m fedlora_kernels`` is the command line."""

import sys

from fedlora_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
