"""``python -m stiefel_lora`` is the command ``stiefel-lora``."""

import sys

from stiefel_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
