import subprocess

import pytest


@pytest.fixture
def started(monkeypatch):
    """All processes that are started from here on, as soon as they are there."""
    processes = []

    class Noted(subprocess.Popen):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes
