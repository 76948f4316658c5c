"""The command `univitar-ds config`."""

from __future__ import annotations

import argparse

from univitar_ds.cli.common import add_command
from univitar_ds.errors import ConfigError
from univitar_ds.screen import show

DESCRIPTION = """Describe the keys of the run file: type, limits, default and meaning.

KEY: a section or a key, such as data, data.sources, stages.0.lr or stages.N.lr. Without it, the sections are listed.

  univitar-ds config stages
  univitar-ds config data.lanes
  univitar-ds config --schema > run.schema.json   for editors; first line of a run file in the same folder:
      # yaml-language-server: $schema=run.schema.json"""


def add_config(commands) -> None:
    """Adds the command `config` to `commands`."""
    parser = add_command(
        commands, "config", _config, "describe the keys of the run file", DESCRIPTION, leaves_files=False
    )
    parser.add_argument("key", nargs="?", metavar="KEY", help="a section or a key (default: list the sections)")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of run files")


def _config(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.keys.describe import describe
    from univitar_ds.config.keys.json_schema import schema_text
    from univitar_ds.config.load import FIXED, RESULT_FREE

    if arguments.schema and arguments.key:
        raise ConfigError(f"--schema prints the schema of the whole run file; leave {arguments.key} out")
    show(schema_text().rstrip("\n") if arguments.schema else describe(arguments.key, RESULT_FREE, FIXED))
