"""`python -m vlmbuild`: the command line."""

import sys

from vlmbuild.cli import main

if __name__ == "__main__":
    sys.exit(main())
