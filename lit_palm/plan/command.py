"""The command line of `lit-palm plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-palm plan",
        allow_abbrev=False,
        description="What a run needs, how long it takes and what it costs. Takes the YAML files and flags of "
        "`lit-palm fit` as they are, and these:",
    )
    add = parser.add_argument
    add("--device", required=True, help="a name of the device table: a100-40gb, a100-80gb, h100, tpu-v4, cpu, or yours")
    add("--devices", type=int, default=1, help="how many (default 1)")
    add("--device_table", help="a YAML file with devices of your own")
    add("--utilisation", type=float, default=0.4, help="share of the peak that the devices compute at (default 0.4)")
    add("--tokens", type=float, help="tokens of the whole run; default: what trainer.max_steps makes")
    add("--network", help="size of networks whose checkpoints do not exist yet: 8b, or a YAML file")
    add("--vocab_size", type=int, help="token ids, where neither network nor tokeniser is there to tell")
    add("--length", type=int, help="tokens of a row of given data, where shorter than its longest")
    add("--prompt_length", type=int, help="tokens of a prompt, where shorter than its longest")
    add("--answers", type=int, default=2, help="answers to a prompt in preferences (default 2)")
    add("--dry-run", "--dry_run", dest="dry_run", action="store_true", help="also trace one rank on fake tensors")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str], parse_fit: Callable[[list[str]], tuple[Any, Any]]) -> int:
    """Plan the run that the arguments of `lit-palm fit` describe.

    Args:
        argv: arguments of `plan`, with those of `fit` among them.
        parse_fit: gives the parsed configuration and its model, from the arguments of `fit`.

    Raises:
        ValueError: naming what is wrong and the way out.
    """
    options, rest = _parser().parse_known_args(list(argv))
    for name in ("devices", "vocab_size", "length", "prompt_length", "answers", "tokens"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}: it must be above 0")
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"--utilisation is {options.utilisation}: it is a share of the peak, above 0 and at most 1")
    from lit_palm.plan.devices import load_devices, ready_device

    devices = load_devices(options.device_table)
    if options.device not in devices:  # before seconds of parsing
        ready_device(options.device, options.device_table, "float32")
    config, module = parse_fit(rest)

    from lit_palm.plan.planning import make_plan
    from lit_palm.plan.reading import read_job
    from lit_palm.plan.report import as_record, as_text
    from lit_palm.plan.sizes import Wishes

    wishes = Wishes(
        devices=options.devices,
        network=options.network,
        vocab_size=options.vocab_size,
        length=options.length,
        prompt_length=options.prompt_length,
        answers=options.answers,
        kernels=devices[options.device].kernels,
    )
    job = read_job(module, config, wishes)
    device = ready_device(options.device, options.device_table, job.precision.flops_name)
    plan = make_plan(job, device, options.utilisation, options.tokens)
    dry = None
    if options.dry_run:
        from lit_palm.plan.dry_run import dry_run

        dry = dry_run(module, job)
    show = as_record(plan, wishes.notes, dry) if options.json else as_text(plan, wishes.notes, dry)
    print(json.dumps(show, indent=2) if options.json else show)
    return 0
