import pytest

from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.shared_slots import SharedSlots


@pytest.fixture
def slots():
    """Room for three images of 28 x 42 px in each of two slots."""
    slots = SharedSlots.create(2, 3 * 28 * 42 * 3)
    yield slots
    slots.close()


@pytest.fixture
def server(slots):
    server = ForkServer(slots)
    yield server
    server.close()
