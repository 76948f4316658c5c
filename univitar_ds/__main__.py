"""`python -m univitar_ds` is the command `univitar-ds`: the form that launchers start."""

from univitar_ds.import_path import drop_current_folder

drop_current_folder()  # before anything is imported that could lie there

import sys  # noqa: E402

from univitar_ds.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
