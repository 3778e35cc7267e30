"""`EngineConformance`: everything that an engine must keep to, as a class of tests to inherit.

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine(self):
            return MyEngine                    # a class, or functools.partial(MyEngine, size=3)

The network is a tiny PaLM over bytes. An engine that samples elsewhere gets it handed over with `update`, as in a run;
what serves it must have been started from one of these sizes (`lit_palm.testing.engine_subject`).
"""

from __future__ import annotations

import docstring_parser
import torch
from jsonargparse import ArgumentParser

from lit_palm.models.weights import named_weights
from lit_palm.rollout.engine import Engine
from lit_palm.testing import entries
from lit_palm.testing.engine_subject import VARIED, EngineSubject, Factory, logps_of, next_logits
from lit_palm.testing.entries import as_yaml, check_api_version, check_entry_point, class_path, parameters, read_yaml

__all__ = ["EngineConformance"]

GROUP = "lit_palm.engines"


class EngineConformance(EngineSubject):
    """What must hold so that what an engine samples can be learned from. A few seconds."""

    # ------------------------------------------------------------------ what comes back

    def test_each_prompt_gets_a_completion(self, engine: Factory) -> None:
        """One completion a prompt, of ids with a log-probability each, and how it ended.

        When it fails, a run stops at the first collection, or learns from the wrong rows.
        """
        prompts = self.prompts()
        found = self.generate(engine, prompts, max_new_tokens=12)
        vocabulary = self.network().config.vocab_size
        for name in ("completions", "logps", "ended", "finish_reason"):
            count = len(getattr(found, name))
            assert count == len(prompts), f"{count} {name} for {len(prompts)} prompts: give one each"
        for row, (ids, logps) in enumerate(zip(found.completions, found.logps, strict=True)):
            reason = found.finish_reason[row]
            assert ids.dtype == torch.long and ids.dim() == 1 and ids.is_cpu, (
                f"completion {row} is {ids.dtype} of shape {list(ids.shape)} on {ids.device}: ids [n] long on the CPU"
            )
            assert logps.dtype == torch.float32 and logps.shape == ids.shape and logps.is_cpu, (
                f"logps {row} is {logps.dtype} of shape {list(logps.shape)}: one float32 for each of {len(ids)} ids"
            )
            assert 1 <= len(ids) <= 12, f"completion {row} has {len(ids)} tokens, 1 to 12 were asked for"
            assert vocabulary is None or bool(((ids >= 0) & (ids < vocabulary)).all()), f"foreign ids in row {row}"
            assert reason in ("eos", "stop", "length"), f"row {row} ended with {reason!r}: use eos, stop or length"
            assert found.ended[row] is (reason != "length"), f"row {row}: ended means that it did not run out of tokens"
            assert reason != "length" or len(ids) == 12, f"row {row} ran out of tokens after {len(ids)} of 12"

    def test_logps_are_those_of_the_network(self, engine: Factory) -> None:
        """Log-probabilities are of softmax(logits / temperature) over the whole vocabulary, before penalties and
        filters; at temperature 0 of softmax(logits). Settings that the engine refuses are left out.

        When it fails, importance ratios are off from the first step on.
        """
        network, prompts = self.network(), self.prompts()
        for name, settings in self.allowed(engine).items():
            found = self.generate(engine, prompts, max_new_tokens=10, **settings)
            for row, prompt in enumerate(prompts):
                expected = logps_of(network, prompt, found.completions[row], settings.get("temperature", 1.0))
                apart = float((expected - found.logps[row]).abs().max())
                assert apart <= self.tolerance, (
                    f"with the settings {name!r}, log-probabilities of row {row} are {apart:.2g} nats off from the "
                    "network's own: report those of softmax(logits / temperature), before penalties and filters"
                )

    def test_greedy_takes_the_likeliest(self, engine: Factory) -> None:
        """At temperature 0 each token is the likeliest one, whatever the seed."""
        network, prompts = self.network(), self.prompts()
        found = self.generate(engine, prompts, max_new_tokens=8, temperature=0.0)
        for row, prompt in enumerate(prompts):
            ids = found.completions[row]
            logits = next_logits(network, prompt, ids)
            short = float((logits.amax(1) - logits.gather(1, ids[:, None]).squeeze(1)).max())
            assert short <= self.tolerance, f"at temperature 0 row {row} has a token that is not the likeliest one"

    def test_filters_are_kept_to(self, engine: Factory) -> None:
        """With top_k no token outside the k likeliest is drawn, with min_p none below that share of the likeliest.

        When it fails, the settings of `sampling` do not reach what draws.
        """
        network, prompts = self.network(), self.prompts()
        for name in self.allowed(engine).keys() & {"top_k", "min_p"}:
            found = self.generate(engine, prompts, max_new_tokens=10, **VARIED[name])
            for prompt, ids in zip(prompts, found.completions, strict=True):
                logits = next_logits(network, prompt, ids)
                taken = logits.gather(1, ids[:, None]).squeeze(1)
                if name == "top_k":
                    least = logits.topk(VARIED[name]["top_k"], dim=1).values[:, -1]
                else:
                    least = logits.amax(1) + torch.tensor(VARIED[name]["min_p"]).log()
                assert bool((taken >= least - self.tolerance).all()), f"with {name} a token was drawn that it forbids"

    # ------------------------------------------------------------------ seeds

    def test_a_row_depends_on_its_prompt_and_seed_alone(self, engine: Factory) -> None:
        """The same prompt and seed give the same tokens, alone, among others and in another order.

        When it fails, a resumed run and one on another number of processes learn from other completions.
        """
        self.needs_repeatable()
        prompts, seeds = self.prompts(), self.seeds()
        together = self.generate(engine, prompts, max_new_tokens=10)
        order = list(reversed(range(len(prompts))))
        backwards = self.generate(engine, [prompts[i] for i in order], seeds[order], max_new_tokens=10)
        alone = self.generate(engine, prompts[1:2], seeds[1:2], max_new_tokens=10)
        for place, row in enumerate(order):
            assert torch.equal(together.completions[row], backwards.completions[place]), (
                f"row {row} is another one in another order: draw from each row's own seed"
            )
        assert torch.equal(together.completions[1], alone.completions[0]), "a row alone is another one than in a batch"

    def test_other_seeds_give_other_tokens(self, engine: Factory) -> None:
        """Equal prompts with different seeds get different completions.

        When it fails, the completions of a group are copies and GRPO has nothing to compare.
        """
        found = self.generate(engine, [self.prompts()[0]] * 4, torch.tensor([1, 2, 3, 2**62]), max_new_tokens=10)
        assert len({tuple(ids.tolist()) for ids in found.completions}) == 4, "other seeds give equal completions"

    # ------------------------------------------------------------------ ends

    def test_eos_ends_a_completion(self, engine: Factory) -> None:
        """EOS ends a completion and is its last id, nothing comes after it, and none ends without it.

        When it fails, policies learn from tokens after the end, or never learn to end.
        """
        eos = self.tokenizer().eos_id
        found = self.many(engine, max_new_tokens=24)
        for ids, reason in zip(found.completions, found.finish_reason, strict=True):
            ends = (ids == eos).nonzero().flatten().tolist()
            assert ends == ([len(ids) - 1] if reason == "eos" else []), (
                f"a completion of {len(ids)} tokens that ended with {reason!r} has EOS at {ends}: keep EOS as the last"
            )
        assert "eos" in found.finish_reason, "of many completions none ended: is eos_id heeded?"

    def test_min_new_tokens_bans_the_end(self, engine: Factory) -> None:
        """No completion is shorter than `min_new_tokens`."""
        found = self.many(engine, max_new_tokens=24, min_new_tokens=20)
        assert min(len(ids) for ids in found.completions) >= 20, "completions are shorter than min_new_tokens"

    def test_stop_texts_end_a_completion(self, engine: Factory) -> None:
        """A stop text ends the completion as soon as it is there, and its ids stay.

        When it fails, rewards see what comes after it, or a text that was cut where no token ends.
        """
        decode, stop = self.tokenizer().decode, list("aeiounst")
        found = self.many(engine, max_new_tokens=24, stop=stop)
        assert "stop" in found.finish_reason, "of many completions none ended at a stop text"
        for ids, reason in zip(found.completions, found.finish_reason, strict=True):
            before, whole = decode(ids[:-1].tolist()), decode(ids.tolist())
            assert not any(text in before for text in stop), f"{before!r} has a stop text, and more comes after it"
            assert (reason == "stop") is any(text in whole for text in stop), f"{whole!r} is said to end by {reason}"

    # ------------------------------------------------------------------ what is asked of it

    def test_tokens_are_told_in_order(self, engine: Factory) -> None:
        """`on_token` hears of every token of every row, in the row's order."""
        heard: dict[int, list[int]] = {}
        found = self.generate(
            engine,
            self.prompts(),
            max_new_tokens=6,
            on_token=lambda row, token: heard.setdefault(row, []).append(token),
        )
        assert heard == {row: ids.tolist() for row, ids in enumerate(found.completions)}, "on_token heard other tokens"

    def test_no_prompts_give_nothing(self, engine: Factory) -> None:
        """No prompts are no error: a process may have none."""
        found = self.generate(engine, [], torch.zeros(0, dtype=torch.long))
        assert found.completions == found.logps == [], "completions for no prompts"

    def test_bad_requests_are_refused(self, engine: Factory) -> None:
        """An empty prompt, an id that the network has not, and a prompt without room are a ValueError each.

        When it fails, they are an error of an index, or silence, deep inside a run.
        """
        config = self.network().config
        bad = {"is empty": torch.zeros(0, dtype=torch.long), "too long": torch.full((config.max_length,), 5)}
        if config.vocab_size is not None:
            bad["has a foreign id"] = torch.tensor([config.vocab_size])
        for what, prompt in bad.items():
            try:
                self.generate(engine, [self.prompts()[0], prompt], torch.tensor([1, 2]), max_new_tokens=4)
            except ValueError:
                continue
            raise AssertionError(f"a prompt that {what} is not refused: see lit_palm.rollout.engine.check_request")

    def test_the_network_is_left_as_it_was(self, engine: Factory) -> None:
        """Weights, mode, gradients and the prompts are what they were.

        When it fails, what is trained after a collection is not what was trained before it.
        """
        network, prompts = self.network().train(), self.prompts()
        state = {name: weight.clone() for name, weight in named_weights(network)}
        copies = [prompt.clone() for prompt in prompts]
        self.generate(engine, prompts, max_new_tokens=4, network=network)
        assert all(module.training for module in network.modules()), "the network is not in the mode it came in"
        for name, weight in named_weights(network):
            assert torch.equal(weight, state[name]) and weight.requires_grad, f"{name} is not what it was"
        assert all(torch.equal(a, b) for a, b in zip(prompts, copies, strict=True)), "the prompts were changed"

    def test_new_weights_count_at_once(self, engine: Factory) -> None:
        """After weights have changed (and were handed over), completions come from the new ones.

        When it fails, it decodes with a copy of old weights: everything that is learned is off-policy.
        """
        network, prompts = self.network(), self.prompts()
        made = self.make(engine, network)
        self.call(made, network, prompts, max_new_tokens=8)
        with torch.no_grad():
            for _, weight in named_weights(network):
                weight.mul_(1.3)
        self.hand_over(made, network, "2")
        found = self.call(made, network, prompts, max_new_tokens=8)
        for row, prompt in enumerate(prompts):
            apart = float((logps_of(network, prompt, found.completions[row]) - found.logps[row]).abs().max())
            assert apart <= self.tolerance, f"row {row} is {apart:.2g} nats off after the weights changed"

    # ------------------------------------------------------------------ what a user of the command line meets

    def test_arguments_are_documented(self, engine: Factory) -> None:
        """Every constructor argument has a line under `Args:` in the docstring of the class."""
        cls, _ = entries.class_and_arguments(engine, Engine, "engine")
        documented = {p.arg_name for base in cls.__mro__[:-1] for p in docstring_parser.parse_from_object(base).params}
        missing = [name for name in parameters(cls) if name not in documented]
        assert not missing, f"{', '.join(missing)} of {cls.__name__} is not documented: describe it under `Args:`"

    def test_yaml_round_trip(self, engine: Factory) -> None:
        """Written under model.engine in YAML and read back, it has the same arguments.

        When it fails, a saved configuration does not repeat its run: mind the types of the arguments.
        """
        cls, arguments = entries.class_and_arguments(engine, Engine, "engine")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--engine", type=Engine)
        given = {"class_path": class_path(cls), "init_args": arguments}
        try:
            made = read_yaml(parser, as_yaml(parser, parser.parse_object({"engine": given}))).engine
        except Exception as error:
            raise AssertionError(
                f"{cls.__name__} with {arguments} cannot be written as YAML and read back: {error}"
            ) from error
        for name, value in vars(engine()).items():
            if name in parameters(cls) and entries.is_plain(value):
                found = getattr(made, name, None)
                assert found == value, f"read back from YAML, {cls.__name__}.{name} is {found!r} instead of {value!r}"

    def test_states_its_api_version(self, engine: Factory) -> None:
        """The class states, as a literal, the version of the interface that it was written for."""
        check_api_version(GROUP, entries.class_and_arguments(engine, Engine, "engine")[0])

    def test_entry_point_leads_to_it(self, engine: Factory) -> None:
        """An installed class is found by its own name through the entry points of its distribution."""
        check_entry_point(GROUP, entries.class_and_arguments(engine, Engine, "engine")[0], self.installed)
