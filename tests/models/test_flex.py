"""FlexAttention over packed rows against the mask over whole rows.

On the host torch runs it without a kernel, forwards and backwards, once it no longer refuses the latter; its graph is
run as it stands. Blocks are of 8 tokens here, so that short rows have several. The kernels of a GPU are
`tests/gpu/test_packed.py`'s.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torchs
from torch.utils._python_dispatch import TorchDispatchMode

from lit_palm.models import PaLMConfig, TokenLogProbs, compiled, flex, palm
from lit_palm.models.attention import bias_of
from lit_palm.models.compiled import compile_blocks
from lit_palm.models.flex import attend_blocks, find_blocks
from lit_palm.models.lora import LoRA
from lit_palm.modules.weights import load_network
from tests.support import config, language_model, text_data, trainer

ROWS = torch.tensor([[0] * 5 + [1] * 12 + [2] * 3 + [-1] * 4, [0] * 1 + [1] * 23, [7] * 24])
PIECES = torch.tensor([[3, 0, 3, 3, 0, 0, -1, 3] * 3])
"""Documents in several pieces, in no order, with padding between."""
HOST = torch.device("cpu")


def forget() -> None:
    flex.why_not.cache_clear()
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "BACKEND", "eager")
    monkeypatch.setattr(flex, "BLOCK", 8)
    forget()
    yield
    forget()


@pytest.fixture
def host_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "is_host", lambda device: False)


def pairs_seen(rows: Tensor) -> Tensor:
    """[B, T, T] bool, by the definition."""
    return (rows[:, :, None] == rows[:, None, :]) & torch.ones(rows.shape[1], rows.shape[1]).bool().tril()


def blocks_of(seen: Tensor) -> Tensor:
    """[B, N, 8, N, 8], what is beyond the row False."""
    over = -seen.shape[1] % 8
    padded = torch.nn.functional.pad(seen, (0, over, 0, over))
    return padded.unflatten(2, (-1, 8)).unflatten(1, (-1, 8))


def dense(counts: Tensor, indices: Tensor) -> Tensor:
    """[B, N, N] bool from BlockMask's lists."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape).masked_fill(listed, 1.0).scatter(3, indices.long(), listed.float())[:, 0].bool()


@pytest.mark.parametrize("rows", [ROWS, ROWS[:, :21], PIECES, ROWS[:, ::2], -torch.ones(1, 24).long()])
def test_the_table_leaves_out_no_block_that_is_seen(rows: Tensor) -> None:
    mask = find_blocks(rows)
    cut = blocks_of(pairs_seen(rows))
    some, every = cut.any(4).any(2), cut.all(4).all(2)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    partial = dense(mask.kv_num_blocks, mask.kv_indices)
    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, every & full) and not (partial & full).any()
    assert torch.equal((partial | full) & some, some)
    if rows is not PIECES:  # documents one after the other
        assert torch.equal(partial | full, some) and torch.equal(full, every)
    whole = torchs.create_mask(mask.mask_mod, len(rows), None, rows.shape[1], rows.shape[1], HOST)
    assert torch.equal(whole[:, 0], pairs_seen(rows))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [ROWS, PIECES, ROWS[:, :21]])
def test_it_is_the_formula(rows: Tensor, kv_heads: int) -> None:
    """float64 on either side, against softmax(q k^T / sqrt(d) + mask) v written out: rounding only."""
    torch.manual_seed(0)
    count, width = rows.shape
    q, k, v = (
        torch.randn(count, width, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    got = attend_blocks(q, k, v, find_blocks(rows))
    bias = bias_of(torch.zeros(count, width, 1, dtype=torch.float64), 0, None, rows, None)
    keys, values = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5 + bias
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (got, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


SETTINGS: list[dict[str, Any]] = [
    {"xpos": True},
    {"qk_norm": "layer", "num_kv_heads": 3},
    {"activation_checkpointing": True},
]


@pytest.mark.parametrize(
    "settings, whole",
    [*((s, False) for s in SETTINGS), *(pytest.param(s, True, marks=pytest.mark.slow) for s in SETTINGS)],
)
def test_a_network_gives_the_same_with_a_mask(
    settings: dict[str, Any], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and gradients in float32, of both ways: 1e-4."""
    torch.manual_seed(0)
    fields = {"vocab_size": 30, "d_model": 48, "num_layers": 2, "num_heads": 3, "head_dim": 16, **settings}
    network = PaLMConfig(**fields, attention="flex").build()
    twin = copy.deepcopy(network)
    twin.config.attention = "sdpa"
    monkeypatch.setattr(palm, "find_documents", lambda documents: None)
    if whole:
        monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # and the derivatives of graphs
        compile_blocks(network)
    tokens, results = torch.randint(0, 30, (3, 24)), []
    for each in (network, twin):
        logps = each(tokens, documents=ROWS, head=TokenLogProbs(tokens, ROWS >= 0))["logps"]
        results.append((logps, torch.autograd.grad(logps.sum(), list(each.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def losses(folder: Path, precision: Any = "32-true", **options: Any) -> tuple[Any, list[float]]:
    """A run of six steps over packed rows of 24 tokens."""
    seen: list[float] = []
    module = language_model(**options)
    original = module.account
    module.account = lambda *args: seen.append(original(*args)) or seen[-1]
    run = trainer(folder, max_steps=6, max_epochs=-1, precision=precision)
    run.fit(module, datamodule=text_data(folder))
    return run, [float(loss.detach()) for loss in seen]


def test_a_run_is_that_of_cut_documents(tmp_path: Path) -> None:
    """float32, losses of six steps relative to 1e-4; the kernel's graph is made once, not for each layer or batch."""
    _, expected = losses(tmp_path, network=config(num_layers=3))
    assert counters["stats"]["unique_graphs"] == 0, "auto is on the host what it has always been"
    run, got = losses(tmp_path, network=config(num_layers=3, attention="flex"))
    assert got == pytest.approx(expected, rel=1e-4)
    # one for the comparison with the mask; training and validation, each also for a last batch of fewer rows
    assert 2 <= counters["stats"]["unique_graphs"] <= 5
    run.save_checkpoint(tmp_path / "six.ckpt")
    assert load_network(tmp_path / "six.ckpt", overrides={"attention": "auto"}).config.attention == "auto"


@pytest.mark.parametrize("options, tolerance", [({"lora": LoRA(rank=2)}, 1e-4), ({"precision": "bf16-mixed"}, 2e-2)])
def test_so_is_one_of_adapters_and_of_16_bits(options: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    """Losses of about 5 nats; products of bfloat16 are rounded to 8 bits, in either way in its own order."""
    _, expected = losses(tmp_path, network=config(), **options)
    _, got = losses(tmp_path, network=config(attention="flex"), **options)
    assert counters["stats"]["unique_graphs"] >= 2 and got == pytest.approx(expected, rel=tolerance)


def test_an_accelerator_goes_by_blocks_unless_told_not_to(
    host_is_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(palm, "find_blocks", lambda documents: found.append(documents.shape) or find_blocks(documents))
    losses(tmp_path, network=config(num_layers=3))
    assert len(found) >= 6 and set(found) >= {(4, 24)}, "once a batch, whatever the number of layers"
    found.clear()
    for other in ({"attention": "sdpa"}, {"dropout": 0.1}):
        losses(tmp_path, network=config(**other))
    assert found == []
    monkeypatch.setattr(flex, "BLOCK", 24)
    losses(tmp_path, network=config())
    assert found == [], "rows of one block"


def test_no_number_for_each_pair_of_tokens(host_is_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is made before attention; the kernel's own are torch's. 4 x 64 x 64 pairs, 4 x 8 x 8 of blocks."""
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=1, num_heads=3, head_dim=16).build()
    rows = torch.arange(64).expand(4, 64) // 11
    with torch.inference_mode():  # as in a validation before training: gradients are compared all the same
        network(torch.randint(0, 30, rows.shape), documents=rows)

    class Largest(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.number = max([self.number, *(t.numel() for t in torch.utils._pytree.tree_leaves(out)
                                              if isinstance(t, Tensor))])  # fmt: skip
            return out

    def refuse(*args: Any) -> None:
        raise AssertionError("a mask over whole rows")

    monkeypatch.setattr(palm, "bias_of", refuse)
    hidden = torch.zeros(4, 64, 48)
    with Largest() as largest:
        assert isinstance(network.attention_bias(hidden, None, rows, None), torchs.BlockMask)
    assert largest.number <= max(4 * 64, 4 * 8 * 9)


def test_a_device_whose_kernel_is_wrong_masks_and_says_so(host_is_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=1, num_heads=3, head_dim=16).build()
    tokens = torch.randint(0, 30, ROWS.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FlexAttention is not used")
        expected = network(tokens, documents=ROWS)
    for fault, words in (
        (lambda *a, **o: torchs.flex_attention(*a, enable_gqa=True), "off by"),
        (broken, "RuntimeError: out of resource: shared memory"),
    ):
        forget()
        monkeypatch.setattr(flex, "flex_attention", fault)
        with pytest.warns(UserWarning, match=f"packed documents are masked instead .*{words}"):
            got = network(tokens, documents=ROWS)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        network.config.attention = "flex"
        with pytest.raises(ValueError, match=f"attention: flex is not possible on cpu: .*{words}.*leave it at auto"):
            network(tokens, documents=ROWS)
        network.config.attention = "auto"


def broken(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nmore lines")


def test_a_processor_that_cannot_train_by_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    forget()
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path))
    monkeypatch.setattr(flex, "BACKEND", "eager")
    monkeypatch.setattr(flex, "BLOCK", 8)
    with pytest.raises(ValueError, match=r"flex is not possible on cpu: .*backward on CPU.*leave it at auto"):
        losses(tmp_path, network=config(attention="flex"))


@pytest.mark.parametrize(
    "fields, words",
    [({"attention": "flash"}, "choose auto, sdpa, flex"), ({"attention": "flex", "dropout": 0.1}, "no dropout")],
)
def test_settings_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PaLMConfig(**fields)
