"""Evaluation tasks for any model on any data: `univitar-ds eval TASK`, with the names in `cli.tasks`."""

__all__ = ["labelled", "models", "peers", "run", "sizes", "sources", "templates"]
