"""Speculation never changes an answer, whatever is drafted; what the drafter and the costs are good
for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import kinds
from models import CONFIGS
from speculating import Oracle, decode, difference, row, speculate, tokens
from tiny_families import PLAIN, RECURRENT, SEVERAL, SLIDING, UNSUPPORTED, tiny

from _mlx_server.inference.constrained.constraint import Constraint, ThinkingBudget
from _mlx_server.inference.decoding.sampling import make_penalties, make_sampler
from _mlx_server.inference.protocol import Sampling
from _mlx_server.inference.speculation.pass_costs import PassCosts
from _mlx_server.inference.speculation.prompt_lookup import PromptLookup
from _mlx_server.inference.speculation.quotable import without_numbers
from _mlx_server.inference.speculation.rollback import Rollback, Unsupported
from _mlx_server.inference.speculation.speculation import Speculation

LENGTH = 40


def slow(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Loaded:
    """A model, its rollback, and new caches for it."""

    def __init__(self, model: Any, quantised: bool = False):
        self.model, self._quantised = model, quantised
        self.rollback = Rollback(model, self.cache())

    def cache(self) -> list[Any]:
        from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

        cache = make_prompt_cache(self.model)
        return [QuantizedKVCache(32, 8) for _ in cache] if self._quantised else cache

    def row(self, prompt: list[int], limit: int = LENGTH, *rest: Any) -> Any:
        return row(self.model, self.cache(), prompt, limit, *rest)


@pytest.fixture(scope="module")
def load(folder: Path) -> Callable[[str], Loaded]:
    from mlx_lm.utils import load_model

    models: dict[str, Loaded] = {}

    def get(kind: str) -> Loaded:
        if kind not in models:
            name, _, quantised = kind.partition(", ")
            models[kind] = Loaded(load_model(folder / name)[0], bool(quantised))
        return models[kind]

    return get


def compare(loaded: Loaded, length: int, seed: int, limit: int = LENGTH) -> tuple[bool, float, int]:
    """Whether the tokens are those without speculation, how far the log-probabilities are apart,
    and how many drafted tokens were wrong."""
    prompt = tokens(length, seed)
    expected, plain = decode(loaded.row(prompt, limit))
    oracle = Oracle(expected, length, seed)
    answer, logprobs, passes = speculate(
        loaded.model, loaded.rollback, loaded.row(prompt, limit), oracle
    )
    if answer != expected:
        return False, 0.0, 0
    assert passes < len(answer) or len(answer) <= 2
    assert oracle.accepted > 0 or len(answer) <= 2  # the last token of an answer comes alone
    return True, difference(plain, logprobs), oracle.drafted - oracle.accepted


@pytest.mark.parametrize("kind", [*CONFIGS, "qwen3, quantised"])
@pytest.mark.parametrize(
    "length", [70, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 200))]
)
def test_no_draft_changes_an_answer(load: Callable[[str], Loaded], kind: str, length: int):
    same, apart, wrong = compare(load(kind), length, length)
    assert same and wrong and apart <= (1e-4 if "sliding" in kind else 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLAIN, *SLIDING, *SEVERAL, *RECURRENT])
def test_no_draft_changes_an_answer_of_any_family(family: str):
    loaded = Loaded(tiny(family))
    for seed, length in enumerate((6, 40)):
        same, apart, _ = compare(loaded, length, seed)
        assert same and apart <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CONFIGS, "qwen3, quantised"])
@pytest.mark.parametrize("fault", ["no cut", "no replay", "off by one"])
def test_each_fault_of_a_rollback_would_be_seen(
    load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
):
    if fault == "no replay" and kind != "hybrid":
        pytest.skip("nothing is replayed")
    keep = Rollback.keep
    if fault == "no cut":
        monkeypatch.setattr(Rollback, "keep", lambda self, kept: keep(self, self.width))
    elif fault == "no replay":
        monkeypatch.setattr(load(kind).rollback.calls, "stop", lambda: [])
    else:
        monkeypatch.setattr(Rollback, "keep", lambda self, kept: keep(self, max(1, kept - 1)))
    try:
        seen = [compare(load(kind), length, 3, 60) for length in (5, 70)]
    except (ValueError, IndexError, AssertionError):
        return
    assert not all(same and apart <= 1e-4 for same, apart, _ in seen)


@pytest.mark.parametrize("family", UNSUPPORTED)
@pytest.mark.slow
def test_a_model_whose_caches_are_not_understood_decodes_plainly(
    family: str, caplog: pytest.LogCaptureFixture
):
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny(family)
    with caplog.at_level("INFO", "mlx_server"):
        assert Speculation.of("it", model, lambda: make_prompt_cache(model), [2]) is None
    assert UNSUPPORTED[family] in caplog.text


def test_a_recurrent_state_that_no_layer_reads_is_seen(load: Callable[[str], Loaded]):
    from mlx_lm.models.cache import ArraysCache

    loaded = load("qwen2")
    with pytest.raises(Unsupported, match="1 of its recurrent states"):
        Rollback(loaded.model, [*loaded.cache(), ArraysCache(1)])


# ------------------------------------------------------------------ how tokens are picked


SETTINGS = {
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalised": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 2.0},
    },
    "penalised and sampled": {"temperature": 1.0, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("kind", kinds("qwen2", among=CONFIGS))
@pytest.mark.parametrize(
    "setting", ["penalised and sampled", *slow("sampled", "filtered", "penalised")]
)
def test_a_seed_gives_the_same_answer_with_drafts(
    load: Callable[[str], Loaded], kind: str, setting: str
):
    loaded, prompt = load(kind), tokens(30)

    def start(seed: int) -> Any:
        sampling = Sampling(**SETTINGS[setting], seed=seed)
        return loaded.row(prompt, 24, make_sampler(sampling, 512), make_penalties(sampling))

    expected, plain = decode(start(1))
    oracle = Oracle(expected, len(prompt))
    answer, logprobs, _ = speculate(loaded.model, loaded.rollback, start(1), oracle)
    assert answer == expected and difference(plain, logprobs) <= 1e-4
    if "sampled" in setting:
        assert len({tuple(decode(start(seed))[0]) for seed in range(4)}) == 4


def matcher(load: Callable[[str], Loaded], folder: Path, pattern: str) -> Any:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    from _mlx_server.inference.constrained.grammar import pattern_grammar
    from _mlx_server.inference.constrained.grammar_compiler import GrammarCompiler
    from _mlx_server.inference.prompt.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(load_tokenizer(folder / "qwen2", eos_token_ids=[2]))
    return GrammarCompiler(tokenizer).matcher(pattern_grammar(pattern))


@pytest.mark.parametrize("thinks", [True, *slow(False)])
def test_a_grammar_holds_an_answer_with_drafts(
    load: Callable[[str], Loaded], folder: Path, thinks: bool
):
    loaded, prompt = load("qwen2"), tokens(30)
    grammar = matcher(load, folder, "[a-f]{3}([0-9]{2} [xyz]+,){4}[01]{9}")
    first = decode(loaded.row(prompt))[0]
    # The grammar begins behind what the model writes anyway, or at once.
    wait = {"thinking_end": first[5:7]} if thinks else {"start": 0}

    def start() -> tuple[Constraint, Any]:
        constraint = Constraint(grammar.deep_copy(), **wait)
        return constraint, loaded.row(prompt, LENGTH, None, [constraint])

    constraint, plain_row = start()
    expected, plain = decode(plain_row, constraint.observe)
    constraint, other = start()
    oracle = Oracle(expected, len(prompt))
    answer, logprobs, _ = speculate(
        loaded.model, loaded.rollback, other, oracle, constraint.observe
    )
    assert answer == expected and difference(plain, logprobs) == 0
    assert oracle.accepted and answer != first


@pytest.mark.parametrize("thinks", [True, *slow(False)])
def test_a_thinking_budget_holds_with_drafts(load: Callable[[str], Loaded], thinks: bool):
    loaded, prompt = load("qwen2"), tokens(30)
    start = [] if thinks else decode(loaded.row(prompt))[0][3:4]

    def begin() -> Any:
        budget = ThinkingBudget(11, len(prompt), start, [300, 301], [302])
        return loaded.row(prompt, LENGTH, None, [budget])

    expected, _ = decode(begin())
    assert 300 in expected
    oracle = Oracle(expected, len(prompt))
    assert speculate(loaded.model, loaded.rollback, begin(), oracle)[0] == expected


# ------------------------------------------------------------------ drafts and their worth


def propose(lookup: PromptLookup) -> tuple[list[int], list[float]]:
    """All that is drafted, and the chances of that."""
    chances = lookup.chances()
    return lookup.draft(None, len(chances)) if chances else [], chances


def test_a_copy_is_found_and_followed():
    text = tokens(300)
    lookup = PromptLookup([*text, 1])
    lookup.follow([*text, 1, *text[50:55]])
    proposed, chances = propose(lookup)
    assert proposed == text[55 : 55 + len(proposed)] and len(proposed) == len(chances) == 31
    assert chances == sorted(chances)  # the longer a copy, the surer
    lookup.follow([*text, 1, *text[50:60]], text[60])
    assert propose(lookup)[0][:20] == text[61:81]


def test_behind_a_change_a_copy_goes_on_soon():
    text = tokens(300)
    lookup = PromptLookup([*text, 1])
    answer = [*text[50:80], 499, 498, 497, *text[81:83]]
    lookup.follow([*text, 1, *answer])
    assert propose(lookup)[0][:20] == text[83:103]


def test_what_is_quotable_goes_before_the_prompt():
    shown, quotable = [5, 6, 7, 8, 9, 100], [5, 6, 7, 8, 9, 200, 201]
    lookup = PromptLookup([*shown, 1, 1], quotable)
    lookup.follow([*shown, 1, 1, 5, 6, 7, 8, 9])
    assert propose(lookup)[0][0] == 200


def test_nothing_is_proposed_for_what_is_new():
    lookup = PromptLookup(tokens(300))
    lookup.follow([*tokens(300), *range(600, 640)])
    assert propose(lookup) == ([], [])


def test_drafts_that_are_wrong_count_as_less_likely():
    text = [1, 2, 3, 4, 5, 6] * 20
    lookup, read = PromptLookup(text), list(text)
    lookup.follow([*text, 1, 2, 3, 4, 5])
    first = lookup.chances()[0]
    read += [1, 2, 3, 4, 5]
    for wrong in range(600, 620):
        read += [wrong, 1, 2, 3, 4, 5]
    lookup.follow(read)
    assert lookup.chances()[0] < first


def test_a_text_of_any_length_is_searched():
    text = tokens(2000)
    lookup, read = PromptLookup(text[:3]), text[:3]
    for at in range(3, 2000, 7):
        read = text[:at]
        lookup.follow(read)
    lookup.follow([*read, *text[700:705]])
    assert propose(lookup)[0] == text[705:736]
    lookup.follow([*read, *text[700:705], 600, 601, *text[1900:1905]])
    assert propose(lookup)[0] == text[1905:1936]


def test_a_pass_that_costs_more_than_it_brings_is_not_made():
    dense = PassCosts({1: 1.0, 2: 1.03, 4: 1.5, 8: 2.7, 16: 4.5, 32: 4.5})
    assert dense.best_draft([0.99] * 31, 0)[0] == 31
    assert dense.best_draft([0.9] * 31, 0)[0] in (2, 3)
    assert dense.best_draft([0.9], 0)[0] == 1
    assert dense.best_draft([0.05] * 31, 0)[0] == 0 == dense.best_draft([], 0)[0]
    assert PassCosts({1: 1.0, 2: 2.0, 32: 32.0}).best_draft([1.0] * 31, 0)[0] == 0


def test_costs_are_measured_a_pass_at_a_time_and_known_with_the_last_one():
    costs, passes, prepared = PassCosts(), [], []

    def prepare() -> Callable[[], None]:
        prepared.append(len(passes))
        return lambda: passes.append(0)

    for steps, _ in enumerate(costs.measure(passes.append, {"head": prepare})):
        assert not costs.known and len(passes) + len(prepared) <= steps
    assert costs.known and list(dict.fromkeys(passes)) == [1, 2, 4, 8, 16, 32, 0]
    assert prepared == [len(passes) - passes.count(0)]


def test_costs_are_corrected_between_requests_only():
    costs = PassCosts({1: 1.0, 2: 1.0, 32: 1.0})
    for _ in range(9):
        costs.note(1, 5000, 0.1)
        costs.note(2, 5000, 0.3)
    assert costs.best_draft([0.9], 5000)[0] == 1
    costs.update()
    assert costs.best_draft([0.9], 5000)[0] == 0 and costs.best_draft([0.9], 100)[0] == 1


def test_numbers_before_lines_are_no_part_of_a_quotation():
    shown = "     9→def f():\n    10→    return 'x'\n    11→"
    assert without_numbers(shown) == "def f():\n    return 'x'\n"
    assert without_numbers("1\ta\n2\tb\n\n<note>") == "a\nb\n\n<note>"
    table = "12\tapples\n7\tpears\n7\tplums"
    assert without_numbers(table) == table
