"""`lit-palm`: LightningCLI for fit, validate, test and predict, plus the verbs Lightning lacks.

    lit-palm fit --config configs/demo/pretrain.yaml [--config overlay.yaml] [--model.objective=DPO] [--print_config]
    lit-palm generate --checkpoint runs/demo/ppo/last.ckpt --prompt "The film"
    lit-palm import palm_410m_8k_v0.pt folder --tokenizer EleutherAI/gpt-neox-20b
    lit-palm export runs/demo/ppo/last.ckpt folder [--gguf] [--push OWNER/NAME]
    lit-palm consolidate runs/sharded/last.ckpt folder
    lit-palm data inspect --config configs/finetune.yaml
    lit-palm plan --config configs/ppo.yaml --device a100-80gb --devices 64 [--dry-run] [--json]
    lit-palm plugins [--json | show NAME]
    lit-palm new-objective NAME [--kind offline|online]

Values come, later over earlier, from defaults, environment variables (LIT_PALM_FIT__TRAINER__MAX_EPOCHS=3), YAML files
in the order given, and flags. A checkpoint never overrides any of them: it brings weights and state.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_palm import plugins
from lit_palm.process import prepare_process

__all__ = ["build_cli", "main"]

EXTRA_VERBS = {
    "generate": "Complete prompts with a checkpoint, streaming to the terminal.",
    "chat": "Talk to a checkpoint on the terminal.",
    "serve": "Serve a checkpoint to clients of OpenAI's interface.",
    "import": "Turn weights of palm-rlhf-pytorch or Cohere into a folder that every stage starts from.",
    "export": "Write a checkpoint for other tools: transformers, llama.cpp, or safetensors of our own.",
    "consolidate": "Put a folder of shards together: one safetensors file a network, or one checkpoint file.",
    "data": "Show what a run would train on: counts, lengths, rows with their loss mask, and what is left out and why.",
    "plan": "Say what a run needs on which devices: memory, time and cost, and what to change where it does not fit.",
    "plugins": "List objectives, rewards, networks and engines, and where they come from.",
    "new-objective": "Write a package with an objective of your own, which trains and passes its tests as it stands.",
}

# which function runs each, imported when it is asked for
_MAINS = {
    "generate": "generate:main",
    "chat": "serve.terminal:main",
    "serve": "serve.command:main",
    "import": "convert.importing:main",
    "export": "convert.exporting:main",
    "consolidate": "generate:consolidate_main",
    "data": "inspection:main",
    "plan": "plan:main",
    "plugins": "plugins:main",
    "new-objective": "scaffold:main",
}
_READ_RUNS = ("data", "plan")
"""Those that take the YAML files and flags of a run."""


def build_cli() -> type[Any]:
    """The CLI class; a function, because importing Lightning takes seconds that `lit-palm plugins` need not pay."""
    import yaml
    from jsonargparse import set_parsing_settings
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    import lit_palm.callbacks as callbacks
    import lit_palm.data
    import lit_palm.modules
    import lit_palm.optim

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            """One line instead of pages of usage; `--help` has those."""
            if not self.exit_on_error or os.environ.get("LIT_PALM_TRACEBACK"):
                super().error(message, ex)  # raises; a value that does not fit one type may fit the next
            print(f"lit-palm: error: {_speaker(ex)}{_one_line(message)}", file=sys.stderr)
            self.exit(2)

    class SaveConfig(SaveConfigCallback):
        """Keeps the whole configuration beside a run's logs; runs without a logger leave nothing behind."""

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            if trainer.logger is not None and stage == "fit":
                super().setup(trainer, pl_module, stage)

    class LitPalmCLI(LightningCLI):
        """LightningCLI whose YAML and flags win over a checkpoint, with the callbacks every run needs."""

        def __init__(self) -> None:
            super().__init__(
                lit_palm.modules.LitModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={"default_env": True, "env_prefix": "LIT_PALM"},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

        def _parse_ckpt_path(self) -> None:
            """Leave the configuration alone: what a checkpoint remembers never overrides YAML and flags."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            config = self._get(self.config_init, "trainer")
            present = [*(config.get("callbacks") or [])]
            missing = [kind for kind in callbacks.DEFAULTS if not any(isinstance(c, kind.replaces()) for c in present)]
            if config.get("enable_progress_bar") is False:
                missing = [kind for kind in missing if kind is not callbacks.ProgressBar]
            if config.get("logger") is False:
                missing = [kind for kind in missing if kind not in callbacks.NEED_LOGGER]
            return super().instantiate_trainer(callbacks=[*present, *(kind() for kind in missing)], **kwargs)

        def _plain_config(self, subcommand: str) -> dict[str, Any]:
            """The resolved configuration, as checkpoints keep it."""
            text = self._parser(subcommand).dump(self.config[subcommand], skip_none=False)
            return dict(yaml.safe_load(text))

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            kwargs = super()._prepare_subcommand_kwargs(subcommand)
            if "weights_only" in kwargs and kwargs["weights_only"] is None:
                kwargs["weights_only"] = True
            self.model.run_config = self._plain_config(subcommand)
            path = kwargs.get("ckpt_path")
            if path and path not in ("best", "last", "hpc", "registry"):
                lit_palm.modules.read_checkpoint(path, header_only=True)  # or the reason why it cannot be resumed
            if subcommand == "predict":
                kwargs["return_predictions"] = False
            return kwargs

    return LitPalmCLI


def parse_fit(argv: list[str], parts: Sequence[str] = ("model",)) -> tuple[Any, ...]:
    """What `lit-palm fit ARGV` would run with: its configuration as parsed, and its model without networks, or data."""
    from jsonargparse import Namespace

    class Reader(build_cli()):  # type: ignore[misc]
        def _set_seed(self) -> None:
            """Nothing is drawn."""

        def instantiate_classes(self) -> None:
            """Neither data nor Trainer is built."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing is run."""

    before = list(sys.argv)
    sys.argv[1:] = ["fit", *argv]
    try:
        plugins.load_named(sys.argv[1:])
        reader = Reader()
    finally:
        sys.argv[:] = before
    config = reader.config["fit"]
    parser = reader._parser("fit")
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = build(Namespace({part: config[part] for part in parts}))
    return config, *(built[part] for part in parts)


# what jsonargparse says beside the reason, when a value fits none of the types that its key allows
_BESIDE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Problem with given class_path|Parser key|"
    r"Expected a <class 'NoneType'>|Expected a path but .* not accessible|Expected a dot import path string"
)
_UNKNOWN = re.compile(r"Expected a dot import path string: (\S+)")
_CHOICE = re.compile(r"Expected a typing\.Literal\[(.*?)\](\. Got value: .*)?$")
_OPTION = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")


def _one_line(message: str) -> str:
    """The reason in an error of the argument parser, which comes nested in everything that was tried, with its key."""
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    unknown = _UNKNOWN.search(message)
    if unknown and re.search(r"Expected a <class '(?!NoneType)", message):
        unknown = None  # the class of a value that may also be a number
    innermost = message[unknown.start() if unknown else max(message.rfind("Problem with given class_path"), 0) :]
    reasons = plugins.explain(f'Parser key "{key}": {innermost}').splitlines()
    if not reasons and unknown:
        reasons = [f"nothing here is called {unknown.group(1)!r}: write the name of a known class, or its import path"]
    if not reasons:
        lines = [re.sub(r'.*Parser key "[^"]+":', "", line).strip().removeprefix("- ") for line in message.splitlines()]
        reasons = [line for line in lines if line and not _BESIDE.match(line)]
        # of a union, the types that the value was never meant to be
        reasons = [r for r in reasons if not re.fullmatch(r"Expected a <class '\w+'>", r)] or reasons
        # of a value that may also be a list of such, the line that says which one does not fit
        choices = [match for r in reasons if (match := _CHOICE.fullmatch(r))]
        reasons = [r for r in reasons if not _CHOICE.fullmatch(r)]
        for choice in dict.fromkeys(match[1] for match in choices):
            got = next((match[2] for match in choices if match[1] == choice and match[2]), "")
            reasons.append(f"Expected one of {choice}{got}")
        if option := _OPTION.search(innermost):
            reasons = [f"Option {option[2]!r} is not accepted", _accepted(*option.groups())]
    text = "; ".join(filter(None, dict.fromkeys(reasons))) or message.strip()
    return f"{key}: {text}" if key else text


def _accepted(class_path: str, option: str) -> str:
    """Which arguments a class does take, the nearest first; "" when it cannot be found."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type):
        return ""
    names = plugins.argument_names(cls)
    near = difflib.get_close_matches(option, names, n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}{name} takes {', '.join(names)}" if names else ""


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    if argv and argv[0] in EXTRA_VERBS:
        module, function = _MAINS[argv[0]].split(":")
        verb_main = getattr(importlib.import_module(f"lit_palm.{module}"), function)
        return int(verb_main(argv[1:], parse_fit) if argv[0] in _READ_RUNS else verb_main(argv[1:]))
    if not argv or argv[0] in ("-h", "--help"):
        print("lit-palm also has:\n" + "\n".join(f"  {v:14} {text}" for v, text in EXTRA_VERBS.items()) + "\n")
    plugins.load_named(argv)
    cli = build_cli()()
    return int(getattr(cli.trainer, "exit_status", 0))  # a callback that ended the run says so


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on stderr and exit status 2; LIT_PALM_TRACEBACK=1 shows where."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_process()
    sys.argv[1:] = argv  # what Lightning's launchers start other ranks with
    try:
        return run(argv)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get("LIT_PALM_TRACEBACK"):
            raise
        if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)):
            print("lit-palm: error: another process of this run has ended; its own message says why", file=sys.stderr)
            return 2
        if not _speaks_for_itself(error):
            raise
        print(f"lit-palm: error: {_speaker(error)}{_one_line(str(error))}", file=sys.stderr)
        return 2


def _speaks_for_itself(error: Exception) -> bool:
    """Whether an error was raised for the user's eyes; anything from deeper down keeps its traceback."""
    frames = [*traceback.extract_tb(error.__traceback__)]
    files = [Path(frame.filename) for frame in frames]
    if type(error).__name__ == "MisconfigurationException":  # Lightning, about its flags
        return True
    parsing = any("jsonargparse" in file.parts for file in files)
    if isinstance(error, ValueError) and (parsing or "lightning" in files[-1].parts):
        return True  # a flag that does not fit the data; an argument that a class refuses
    raised = (frames[-1].line or "").startswith("raise ")
    if isinstance(error, RuntimeError) and raised and "lightning" in files[-1].parts:
        return True  # a strategy whose sizes are not those of the machine
    if isinstance(error, ValueError | OSError | RuntimeError) and Path(__file__).parent in files[-1].parents:
        return True
    # A plugin that refuses says so; an error in its arithmetic, which torch raises, is for its author.
    refused = isinstance(error, ValueError) and (frames[-1].line or "").startswith("raise ")
    return refused and _plugin_at_fault(error) is not None


def _plugin_at_fault(error: BaseException) -> object | None:
    """The innermost objective, reward, network configuration or engine whose own package raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0]
    for frame in reversed(frames):
        this = frame.f_locals.get("self")
        if any(cls.__module__.partition(".")[0] == package for cls in type(this).__mro__) and plugins.is_plugin(this):
            return this
    return None


def _speaker(error: BaseException | None) -> str:
    """The class whose argument is refused, where the message does not name it: several may have a `beta`."""
    while error is not None and error.__cause__ is not None and _is_parsers(error):
        error = error.__cause__  # the parser tells it again, once for each class around it
    this = _plugin_at_fault(error) if error is not None and error.__traceback__ is not None else None
    name = type(this).__name__
    return "" if this is None or re.search(rf"\b{name}\b", str(error)) else f"{name}: "


def _is_parsers(error: BaseException) -> bool:
    return "jsonargparse" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


if __name__ == "__main__":
    sys.exit(main())
