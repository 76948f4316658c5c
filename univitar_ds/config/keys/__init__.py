"""The keys of the run file: descriptions, paths, earlier names, names in other trainers, faults, unused keys."""

__all__ = ["describe", "faults", "foreign", "json_schema", "places", "renamed", "tree", "unused"]
