"""What a device can do: peaks are of the right size, and 16-bit products are judged by capabilities alone."""

from __future__ import annotations

import pytest
import torch

from lit_palm.models import hardware
from lit_palm.models.hardware import measure_peak_bandwidth, measure_peak_flops, multiplies, useful_dtype

HERE = torch.zeros(1).device


@pytest.fixture
def processor(monkeypatch):
    """Says what the processor is to be able to do."""

    def pretend(**able: object) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
        hardware._KNOWN.clear()

    yield pretend
    hardware._KNOWN.clear()


def test_peaks_are_those_of_a_machine() -> None:
    flops, bandwidth = measure_peak_flops(HERE), measure_peak_bandwidth(HERE, num_bytes=2**25, repeats=3)
    assert 1e8 < flops < 1e17
    assert 1e7 < bandwidth < 1e14


def test_old_processors_do_not_multiply_bfloat16(processor) -> None:
    processor(architecture="x86_64", avx512_f=True, avx512_bf16=False, amx_bf16=False)
    assert not multiplies(HERE, torch.bfloat16) and multiplies(HERE, torch.float32)
    assert useful_dtype(HERE, torch.bfloat16) is torch.float32
    processor(architecture="x86_64", avx512_bf16=True)
    assert multiplies(torch.zeros(1), torch.bfloat16) and not multiplies(HERE, torch.float16)
    processor(architecture="aarch64")
    assert multiplies(HERE, torch.bfloat16)


def test_accelerators_multiply_everything(processor) -> None:
    processor(architecture="x86_64")
    assert multiplies(torch.device("meta"), torch.bfloat16)
    assert useful_dtype(torch.device("meta"), torch.float16) is torch.float16


def test_the_peak_of_a_type_is_that_of_what_computes_it(processor, monkeypatch) -> None:
    made = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: made.append(options["dtype"]) or ones(*size, **options))
    processor(architecture="x86_64")
    assert measure_peak_flops(HERE, torch.bfloat16) > 0
    assert set(made) == {torch.float32}
