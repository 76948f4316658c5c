import subprocess

import pytest


@pytest.fixture
def started(monkeypatch):
    """A list of the processes that are started in the test, in order. A process is in it as soon as it runs."""
    processes = []

    class Noted(subprocess.Popen):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes
