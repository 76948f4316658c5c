"""The keys of the run file: what each means, names that other trainers use for them, and faults in their values;
keys that are set without effect, and earlier names."""

__all__ = ["describe", "faults", "foreign", "json_schema", "renamed", "tree", "unused"]
