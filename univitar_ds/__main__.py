"""`python -m univitar_ds` runs the command `univitar-ds`. Launchers start it in this form."""

from univitar_ds.import_path import drop_current_folder

drop_current_folder()  # before any import that could find a module in the current folder

import sys  # noqa: E402

from univitar_ds.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
