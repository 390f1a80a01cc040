import pytest
import torch

from tests.tuning.toy import ToyPolicy


@pytest.fixture
def policy() -> ToyPolicy:
    torch.manual_seed(0)
    return ToyPolicy()
