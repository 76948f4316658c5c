"""`python -m univitar_ds` is the command `univitar-ds`: the form in which launchers start it."""

from univitar_ds.import_path import drop_current_folder

drop_current_folder()  # before any import that could find a module there

import sys  # noqa: E402

from univitar_ds.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
