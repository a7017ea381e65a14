"""Which precision the calibration and the training of small LLaMAs multiply matrices in."""

import pytest
import torch

from conversion.calibration import speed
from conversion.calibration.speed import faster_in_bfloat16
from conversion.calibration.streams import fast_precision


def rates(monkeypatch, bfloat16: float) -> None:
    """A machine that multiplies float32 at a rate of 1 and bfloat16 at this one."""
    found = {torch.float32: 1.0, torch.bfloat16: bfloat16}
    monkeypatch.setattr(speed, "product_rate", lambda device_type, dtype: found[dtype])


@pytest.mark.parametrize(("bfloat16", "dtype"), [(0.02, torch.float32), (1.2, torch.float32), (2.0, torch.bfloat16)])
def test_products_are_bfloat16_where_that_is_faster_by_enough(bfloat16, dtype, monkeypatch):
    rates(monkeypatch, bfloat16)
    matrix = torch.ones(4, 4)
    with fast_precision(torch.device("cpu")):
        assert (matrix @ matrix).dtype == dtype


def test_devices_whose_autocast_nobody_tried_stay_in_float32(monkeypatch):
    rates(monkeypatch, bfloat16=10.0)
    assert faster_in_bfloat16("cuda")
    assert not faster_in_bfloat16("mps")
