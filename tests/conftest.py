"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

os.environ["DS_ACCELERATOR"] = "cpu"  # runs of tests train on the CPU; the kernels' tests look for a GPU by themselves

# Speed is measured in benchmarks/; a busy machine is no reason for a property to fail.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
