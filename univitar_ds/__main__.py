"""`python -m univitar_ds` is the command `univitar-ds`: the form that launchers start."""

import sys

from univitar_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
