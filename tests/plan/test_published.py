"""Parameters, operations and speeds of runs that others published, from the formulas alone."""

from __future__ import annotations

import pytest

from lit_palm.models.flops import (
    attention_flops,
    flops_per_token,
    gpt_parameters,
    model_flops_utilisation,
    training_flops,
)
from lit_palm.models.palm import PaLMConfig
from lit_palm.plan.devices import load_devices
from lit_palm.plan.job import Job, NetworkShape, OptimizerCost, Sharding
from lit_palm.plan.reading import PRECISIONS
from lit_palm.plan.speed import speed_of, throughput
from tests import support


def palm(name: str, **changes: object) -> NetworkShape:
    return NetworkShape(PaLMConfig.preset(name, **changes))


# Chowdhery et al. 2022: table 1 (parameters), table 2 (tokens of the 62B: 795B), table 20 (training FLOPs)
@pytest.mark.parametrize(
    "name, parameters, tokens, flops",
    [("8b", 8.63e9, 780e9, 4.29e22), ("62b", 62.50e9, 795e9, 3.08e23), ("540b", 540.35e9, 780e9, 2.56e24)],
)
def test_palm(name: str, parameters: float, tokens: float, flops: float) -> None:
    shape = palm(name)
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    assert training_flops(shape.parameters, shape.attention(2048)) * tokens == pytest.approx(flops, rel=0.01)


def test_gpt_3() -> None:
    # Brown et al. 2020, table 2.1 and appendix D, whose 3.14e23 leaves attention out
    parameters = gpt_parameters(d_model=12288, num_layers=96, vocab_size=50257, max_length=2048)
    assert parameters == pytest.approx(174.6e9, rel=0.01)
    assert training_flops(parameters) * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_palm_540b_on_6144_chips() -> None:
    # 238.3k tokens a second at 46.2% model FLOPs utilisation of 6,144 TPU v4 (the paper's table 3)
    shape, chip = palm("540b"), load_devices()["tpu-v4"]
    flops, peak = training_flops(shape.parameters, shape.attention(2048)), chip.flops["bfloat16"]
    assert peak is not None
    assert throughput(flops, 6144, peak, 0.462) == pytest.approx(238.3e3, rel=0.02)
    assert model_flops_utilisation(238.3e3, flops, 6144, peak) == pytest.approx(0.462, rel=0.02)
    job = Job(
        kind="language_model",
        objective="LanguageModeling",
        needs=frozenset(),
        trained={"policy": shape},
        frozen={},
        rows=1,
        length=2048,
        targets=2047,
        precision=PRECISIONS["bf16-mixed"],
        optimizer=OptimizerCost("Adafactor", 8, 0, 0),
        sharding=Sharding("fsdp2", 6144, 1, 6144),
        devices=6144,
    )
    speed = speed_of(job, chip, 0.462, 780e9)
    assert speed.tokens_per_second == pytest.approx(238.3e3, rel=0.02)
    assert speed.total_flops == pytest.approx(2.56e24, rel=0.01)
    assert speed.days == pytest.approx(780e9 / 238.3e3 / 86400, rel=0.02)
    # recomputing every block costs a third more time for the same tokens
    again = Job(**{**vars(job), "trained": {"policy": palm("540b", activation_checkpointing=True)}})
    assert speed_of(again, chip, 0.462, 780e9).tokens_per_second == pytest.approx(238.3e3 * 3 / 4, rel=0.02)


def test_bloom() -> None:
    # Scao et al. 2022: 176.2B parameters, 366B tokens, 384 A100-80GB at 150 TFLOP/s each with recomputation, so 8
    # operations a parameter and token; it took 118 days with everything that went wrong
    parameters = gpt_parameters(d_model=14336, num_layers=70, vocab_size=250880, max_length=0)
    assert parameters == pytest.approx(176.2e9, rel=0.01)
    peak = load_devices()["a100-80gb"].flops["bfloat16"]
    assert peak == 312e12
    speed = throughput(training_flops(parameters, recomputed=True), 384, peak, 150e12 / peak)
    days = 366e9 / speed / 86400
    assert days == pytest.approx(103, rel=0.02)
    assert days == pytest.approx(118, rel=0.15)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 2}, {"d_ffn": 24}, {"qk_norm": "l2"}, {"qk_norm": "layer", "num_heads": 4, "num_layers": 3}],
)
@pytest.mark.parametrize("scalar", [False, True])
def test_parameters_are_those_of_the_network(changes: dict[str, object], scalar: bool) -> None:
    from lit_palm.models.base import ScalarNetwork

    config = support.config(vocab_size=50, **changes)
    network = ScalarNetwork(config.build()) if scalar else config.build()
    shape = NetworkShape(config, scalar)
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    blocks = (network.trunk if scalar else network).blocks()  # type: ignore[union-attr, operator]
    assert shape.block == sum(p.numel() for p in blocks[0].parameters())


def test_flops_of_modules() -> None:
    config = support.config(vocab_size=50, num_layers=2)
    trained, frozen = config.build(), config.build().requires_grad_(False)
    parameters, attention = NetworkShape(config).parameters, attention_flops(2, 2, 8, 32)
    assert flops_per_token([trained], 32) == 6 * parameters + 3 * attention
    assert flops_per_token([trained, frozen], 32) == 8 * parameters + 4 * attention
