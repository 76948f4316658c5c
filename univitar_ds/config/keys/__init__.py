"""The keys of the run file: descriptions, earlier names, names in other trainers, faults in values, unused keys."""

__all__ = ["describe", "faults", "foreign", "json_schema", "renamed", "tree", "unused"]
