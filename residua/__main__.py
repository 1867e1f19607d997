"""`python -m residua` is the same as `residua`."""

import sys

from residua.pipelines.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
