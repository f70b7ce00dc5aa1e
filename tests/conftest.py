"""What all tests share: few threads, and the recorded data that only some checkouts have."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Small shapes lose time on many threads. OMP_NUM_THREADS can ask for fewer.
    torch.set_num_threads(min(torch.get_num_threads(), 4))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of recorded real-model data beside the checkout; the test is skipped without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs recorded data in {folder}")
    return folder
