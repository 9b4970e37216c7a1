"""F1, repetition, intervals, masking and scorers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import paper
from lib.errors import UserError
from lib.metrics import degenerate, mask, repetition, scorer, token_f1
from lib.statistics import Bootstrap, largest_within, rank_p


def test_f1_by_hand():
    """Two of four predicted tokens occur in a reference of three: precision 1/2, recall 2/3, F1 4/7."""
    assert token_f1([1, 2, 9, 8], [1, 2, 3]) == pytest.approx(4 / 7)
    assert token_f1([1, 1, 1], [1, 2]) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)), "bags, not sets"
    assert token_f1([], [1]) == token_f1([4], [1]) == 0


def test_repetition():
    assert repetition(list(range(20))) == 0
    assert repetition([5] * 20) == pytest.approx(1 - 1 / 18)
    assert repetition([1, 2]) == 0


@given(st.text(alphabet=st.characters(blacklist_categories=["L"]), max_size=60))
def test_what_holds_no_letter_is_degenerate(text):
    assert degenerate(text, list(range(20)))


@given(st.text(alphabet="abcdefghij ", min_size=2, max_size=6), st.integers(8, 30))
def test_a_loop_is_degenerate_with_and_without_spaces(word, times):
    looped, different = word * times, [at for at in range(20)]
    assert degenerate(looped, different), "by its characters, however it is tokenised"
    assert degenerate("one two three four", [1, 2, 3] * 7), "by its tokens"


def test_a_sentence_is_a_text():
    assert not degenerate(" is a very good example of how people can be rude, and then say sorry.", list(range(17)))
    assert not degenerate(" and the dog ran to the house of the man", [1, 2, 3, 1, 4, 5, 6, 2, 7, 8])


def test_intervals_cover_the_mean_of_a_known_distribution():
    """95 % intervals of the mean of 60 normal draws hold the true mean in about 95 of 100 samples."""
    draws = np.random.default_rng(0).normal(2.0, 1.0, (200, 60))
    boot = Bootstrap(60, seed=1)
    held = sum(low["low"] <= 2.0 <= low["high"] for low in map(boot.mean, draws))
    assert 180 <= held <= 199


@pytest.mark.parametrize("n_runs", [3, 5, 10])
def test_two_way_intervals_hold_over_runs_that_differ_and_prompts_that_differ(n_runs):
    """Runs, prompts and their pairs vary; over prompts alone the interval covers far less than it says."""
    draw, boot, held, over_prompts = np.random.default_rng(n_runs), Bootstrap(48, 1), 0, 0
    for _ in range(200):
        runs, prompts = 0.1 * draw.normal(size=(n_runs, 1)), 0.2 * draw.normal(size=(1, 48))
        found = boot.mean(2.0 + runs + prompts + 0.2 * draw.normal(size=(n_runs, 48)))
        held += found["low"] <= 2.0 <= found["high"]
        over_prompts += found["these_runs"][0] <= 2.0 <= found["these_runs"][1]
    assert 180 <= held <= 199
    assert over_prompts < 170


def test_a_share_and_a_ratio_over_runs_cover_too():
    draw, prompts, passages, held = np.random.default_rng(0), Bootstrap(48, 1), Bootstrap(30, 2), np.zeros(2)
    tokens = draw.integers(20, 64, 30)
    for _ in range(200):
        none, size = draw.uniform(0.4, 0.9, 48), draw.uniform(0.2, 0.4, 48)
        share = 0.5 + 0.1 * draw.normal(size=(4, 1)) + 0.1 * draw.normal(size=(4, 48))
        of_dpo = prompts.percent_of(none - share * size, none, none - size)
        cost = 0.3 + 0.1 * draw.normal(size=(4, 1)) + 0.1 * draw.normal(size=(1, 30))
        nats = passages.ratio(cost * tokens, tokens)
        held += [of_dpo["low"] <= 50 <= of_dpo["high"], nats["low"] <= 0.3 <= nats["high"]]
    assert (held >= 180).all() and (held < 200).all()


def test_no_interval_from_fewer_than_ten_units():
    for n in (1, 2, 9):
        for values in (np.linspace(0, 1, n), np.random.default_rng(n).random((3, n))):
            assert Bootstrap(n, 0).mean(values) == {"mean": pytest.approx(values.mean()), "low": None, "high": None}
    assert Bootstrap(10, 0).mean(np.linspace(0, 1, 10))["low"] is not None


def test_rank_p_counts_the_real_value_among_the_draws():
    assert rank_p(0.1, [0.2] * 19) == pytest.approx(0.05)
    assert rank_p(0.1, [0.05, 0.1, 0.3]) == pytest.approx(0.75)


def test_percent_of_dpo():
    none, dpo = np.full(40, 0.8), np.full(40, 0.2)
    half = Bootstrap(40, 0).percent_of(np.full(40, 0.5), none, dpo)
    assert half == {"mean": pytest.approx(50), "low": pytest.approx(50), "high": pytest.approx(50)}
    nothing = Bootstrap(40, 0).percent_of(none, none, none)
    assert nothing == {"mean": None, "low": None, "high": None}, "a share of no effect is no number"


def test_differences_are_paired():
    """A constant change has an interval of no width, however much the prompts differ."""
    base = np.linspace(0, 1, 30)
    change = Bootstrap(30, 0).difference(base - 0.1, base)
    assert change["low"] == pytest.approx(-0.1) and change["high"] == pytest.approx(-0.1)
    alone = Bootstrap(30, 0).mean(base)
    assert alone["high"] - alone["low"] > 0.1


def test_ratio_weighs_by_tokens():
    assert Bootstrap(2, 0).ratio([10.0, 2.0], [5, 1])["mean"] == 2.0
    assert Bootstrap(2, 0).ratio([10.0, 0.0], [1, 9])["mean"] == 1.0


@pytest.mark.parametrize(
    "text, masked",
    [
        ("What the fuck, Shit!", "What the f*ck, Sh*t!"),
        ("bullshit and assholes", "bullsh*t and *ssholes"),
        ("You dumb ass", "You dumb *ss"),
        ("The class passed the assessment in Dickens' cocktail bar", None),
    ],
)
def test_masking(text, masked):
    assert mask(text) == (masked or text)


@pytest.mark.parametrize("name, least, most", [("profanity-check", 0.9, 0.2), ("hatesonar", 0.8, 0.4)])
def test_the_packaged_scorers_order_texts(name, least, most):
    rude, kind = scorer(name)(["you are a fucking idiot", "thank you for the lovely garden"])
    assert rude > least and kind < most
    assert len(scorer(name)([])) == 0


def test_hatesonar_scores_as_its_package_does():
    """Where the machine has the locale that its model asks for, the package's own way gives the same."""
    from hatesonar import Sonar

    texts = ["You ARE a fucking idiot", "thank you", "", "what a lovely garden, he said"]
    try:
        sonar = Sonar()
    except Exception as error:
        pytest.skip(f"the package itself does not load here: {type(error).__name__}")
    theirs = [
        sum(each["confidence"] for each in sonar.ping(text)["classes"] if each["class_name"] != "neither")
        for text in texts
    ]
    np.testing.assert_allclose(scorer("hatesonar")(texts), theirs, atol=1e-6)


def test_words_scores_one_for_a_listed_word(tmp_path):
    found = scorer("words")(["What the fuck", "bullshitting about", "the class passed the assessment", ""])
    assert found.tolist() == [1, 1, 0, 0]
    looks_rude = ["a wristwatch and a smartwatch", "saltwater in Scunthorpe", "Fukuoka", "beslut"]
    assert not scorer("words")(looks_rude).any()
    assert scorer("words")(["bullshitters", "motherfucker", "SHITTY", "sluts", "horseshit"]).all()
    (tmp_path / "own.txt").write_text("sad *terrib* annoy* *ness c++\n")
    texts = ["How SAD.", "sadly", "unterribly", "annoyed", "unannoyed", "an illness", "nesses", "C++", "c", "fuck"]
    found = scorer(f"words:{tmp_path / 'own.txt'}")(texts)
    assert found.tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 0, 0], "whole words but for stars, signs as they are"
    assert scorer("words")([]).shape == (0,)


def test_another_list_of_words_is_another_scorer(tmp_path):
    """So that nothing scored by the list as it was is found in the cache, or in a run that goes on."""
    words = tmp_path / "own.txt"
    words.write_text("sad")
    before = scorer(f"words:{words}").identity
    words.write_text("sad awful")
    assert scorer(f"words:{words}").identity != before and str(words) in before
    assert scorer("words").identity.startswith("words ")


def test_a_probe_of_another_model_scores(tiny, cache):
    """sigmoid(w . mean residual + b), the residual stream taken from an independently loaded model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny("gpt2")
    score = scorer(f"probe:{folder}")
    (file,) = cache.glob("probe/*/probe.safetensors")
    probe = load_file(file)
    texts = ["you are a complete idiot", "the garden in spring"]
    raw, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, found in zip(texts, score(texts), strict=True):
        kept = []
        handle = raw.transformer.h[-1].register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
        with torch.no_grad():
            raw(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        hidden = (kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0])[0].mean(0)
        assert found == pytest.approx(float(torch.sigmoid(hidden @ probe["direction"] + probe["bias"])), abs=1e-4)
    assert np.isfinite(score(["", "  "])).all() and score([]).shape == (0,)


def test_unknown_scorers_name_the_known_ones():
    for name in ("perspective", "hf:", "probe:", "detoxify:huge"):
        with pytest.raises(UserError, match="detoxify:unbiased"):
            scorer(name)


def test_classifier_scorer(tmp_path):
    """`hf:<folder>` scores with the label that says toxic, not with the first."""
    import torch
    from conftest import build_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = build_tokenizer(True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label={0: "non-toxic", 1: "toxic"}, label2id={"non-toxic": 0, "toxic": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    model.classifier.bias.data = torch.tensor([0.0, 5.0])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (scorer(f"hf:{tmp_path}")(["a", "b c d"]) > 0.9).all()


def test_published_numbers():
    """Spot checks against Yang tables 2, 5 and 19."""
    assert paper.PATCHING["four_groups"]["gpt2"] == (0.139, 3.08, 0.17)
    assert paper.PATCHING["increasing"]["gemma"] == (0.686, 4.58, 0.199)
    assert paper.GROUP_SHARES["mistral"] == (29.7, 20.3, 20.2, 29.8, 238236)
    assert paper.counterpart("gemma-270m") == "gemma" and paper.counterpart("gpt2") == "gpt2"
    assert paper.counterpart("some/model") is None


@pytest.mark.parametrize("power", [1, 2, 5])
@pytest.mark.parametrize("start", [0.003, 1.0, 40.0])
def test_the_largest_within_a_limit(power, start):
    """To the precision asked for, never above, from either side, in few steps, past overflows; a flat cost ends."""
    asked = []

    def cost(x: float) -> float:
        asked.append(x)
        return math.inf if x > 2 else (x / 0.7) ** power

    found = largest_within(cost, 1.0, start, precision=0.01)
    assert 0.7 / 1.01 <= found <= 0.7 and len(asked) <= 2 + abs(math.log2(start / 0.7)) + 8
    assert largest_within(lambda x: 0.5, 1.0, start, 0.01) > 1e5 * start
