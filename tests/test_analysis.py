"""Analysis of text sets: hand-computed cases, and the stage on invented text."""

import csv
import json

import numpy as np
import pytest

from unidetox_jax.analysis import copying, description, keywords, leaning
from unidetox_jax.errors import UserError
from unidetox_jax.stages import analyze, settings
from unidetox_jax.stages.task import run_tasks

PUBLISHERS = {
    "left": ("The Hill Post", "Hill Post (Web News)", "River Star"),
    "center": ("Bridge Wire", "Mill Times", "Mill Times - Opinion"),
    "right": ("Lake Herald", "Coast Mirror", "Coast Mirror"),
}
WORDS = {"left": "commons orchard union", "center": "meeting ledger minutes", "right": "market thrift fences"}


def articles():
    """(texts, labels, sources): words of a leaning among random words."""
    generator = np.random.default_rng(0)
    rows = []
    for label, sources in PUBLISHERS.items():
        for number in range(30):
            filler = " ".join(f"word{i}" for i in generator.integers(0, 40, 20))
            rows.append((f"{WORDS[label]} {filler}", label, sources[number % len(sources)]))
    return [list(column) for column in zip(*rows, strict=True)]


def test_description_by_hand():
    found = description.describe(["one two three", "One  two three", "", "a a a a a a a a a a"])
    assert found["texts"] == 4
    assert found["words"]["total"] == 16 and found["words"]["distinct"] == 4
    assert found["words"]["mean"] == 4.0 and found["words"]["median"] == 3.0
    assert found["duplicates"] == 1
    assert found["degenerate"] == {"empty": 1, "no words": 0, "repetitive": 1}
    assert found["degenerate_share"] == 0.5


def test_jaccard_by_hand():
    one, other = (description.vocabulary(texts) for texts in (["A cat, a dog!", "cat 7"], ["The cat -- the bird"]))
    assert one == {"a", "cat", "dog", "7"} and other == {"the", "cat", "bird"}
    assert description.jaccard(one, other) == 1 / 6
    assert description.jaccard(set(), set()) == 0 and description.jaccard(one, one) == 1


def test_keywords_by_hand():
    sets = {
        "boats": ["The boat has a sail.", "A boat, a harbour!", "sail to the harbour, weather permitting"],
        "bread": ["Bread and flour.", "The flour for bread", "weather spoils bread 1234"],
    }
    found = keywords.keywords(sets, 3)
    assert {entry["word"] for entry in found["boats"]["frequent"]} == {"boat", "sail", "harbour"}
    assert found["bread"]["distinctive"][0]["word"] == "bread"
    assert found["bread"]["distinctive"][0]["texts"] == 1.0
    assert "1234" not in {entry["word"] for entry in keywords.keywords(sets, 20)["bread"]["frequent"]}
    assert "the" not in {entry["word"] for entry in keywords.keywords(sets, 20)["boats"]["frequent"]}
    assert keywords.keywords({"none": ["the of and"]}, 3) == {"none": {"frequent": [], "distinctive": []}}


def test_a_single_set_has_no_distinctive_keywords():
    assert keywords.keywords({"only": ["boat harbour"]}, 2)["only"]["distinctive"] == []


def test_overlap_by_hand():
    corpus = copying.Corpus(["The oafs of the hill spoil the bread again.", "a b c d e"])
    texts = ["We heard: THE OAFS of the  hill spoil nothing", "x y z", "c d e a b"]
    found = copying.overlap(texts, corpus, 4)

    assert found["ngrams"] == 7 + 0 + 2
    assert found["shared"] == 3
    assert found["share"] == pytest.approx(3 / 9)
    assert found["texts_with_shared"] == 1
    assert (found["longest_run"], found["longest_run_text"]) == (6, 0)
    assert copying.overlap(["c d e a b"], corpus, 4)["longest_run"] == 3


def test_overlap_with_nothing_in_common():
    found = copying.overlap(["x y z", ""], copying.Corpus(["a b c"]), 8)
    assert found["share"] == 0.0 and found["longest_run"] == 0 and found["longest_run_text"] is None


def test_longest_run_is_bounded():
    text = "one two " * copying.LONGEST_RUN
    assert copying.overlap([text], copying.Corpus([text]), 2)["longest_run"] == copying.LONGEST_RUN


def test_nearest_finds_a_copied_sentence_among_many():
    corpus = copying.Corpus([f"number {i} is a dull oaf of the {i} mill" for i in range(3000)])
    texts = [f"Sentence {i} speaks of boats and sails. Nothing else is said here." for i in range(1500)]
    texts[1234] = "All is well. Number 77 is a dull oaf of the 77 mill. Goodbye."
    found = copying.nearest(texts, corpus, 3)
    assert len(found) == 3
    assert found[0]["text"] == 1234
    assert found[0]["corpus_sentence"] == "number 77 is a dull oaf of the 77 mill"
    assert 0.9 < found[0]["similarity"] <= 1.0 and found[1]["similarity"] < 0.5
    assert [pair["similarity"] for pair in found] == sorted((pair["similarity"] for pair in found), reverse=True)


def test_nearest_of_nothing():
    assert copying.nearest(["", "But ... no!"], copying.Corpus(["a b c d"]), 3) == []
    assert copying.nearest(["four words of text"], copying.Corpus(["quite other things altogether"]), 3) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("CNN (Web News)", "cnn"),
        ("The Lake Herald", "lake herald"),
        ("Mill Times - Opinion", "mill times"),
        ("Theatre Weekly", "theatre weekly"),
        ("AP Fact Check", "associated press"),
    ],
)
def test_publisher(source, name):
    assert leaning.publisher(source) == name


def test_leaning_is_split_by_publisher_and_learns_their_common_words():
    found = leaning.fit(*articles(), words=3)
    assert found.labels == ("left", "center", "right")
    folds = [set(fold["publishers"]) for fold in found.quality["folds"]]
    assert len(folds) >= 2 and sum(map(len, folds)) == len(set().union(*folds)) == 6
    assert sum(fold["articles"] for fold in found.quality["folds"]) == 90
    assert found.quality["accuracy"] == 1.0 == found.quality["accuracy_short"]
    probabilities = found.probabilities(["orchard union", "fences and thrift", ""])
    assert probabilities.shape == (3, 3) and probabilities.sum(axis=1) == pytest.approx(1)
    assert probabilities[:2].argmax(axis=1).tolist() == [0, 2]
    assert probabilities[2].tolist() == pytest.approx(list(found.quality["of_nothing"].values()))


def test_house_style_is_not_learnt_as_leaning():
    """Words identify publishers only, so that a split by articles would give a perfect accuracy."""
    texts, labels, sources = articles()
    style = [f"style{leaning.publisher(source).replace(' ', '')} says so" for source in sources]
    assert leaning.fit(style, labels, sources).quality["accuracy"] < 0.5


def test_leaning_needs_two_publishers_per_label():
    texts, labels, sources = articles()
    with pytest.raises(UserError, match="all articles labelled 'left' are by 'hill post'; expected several"):
        leaning.fit(
            texts, labels, ["Hill Post" if label == "left" else s for label, s in zip(labels, sources, strict=True)]
        )


def test_leaning_summary_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]])
    found = leaning.summarize(probabilities, ("left", "center", "right"), 200, 0)
    assert found["probability"]["left"]["mean"] == pytest.approx(0.25)
    assert found["called"]["right"]["mean"] == 0.75
    assert found["balance"]["mean"] == pytest.approx((-0.6 + 0.6 + 0.4 + 1.0) / 4)


# --------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def run(tmp_path):
    """A working directory with distilled text and samples, labelled news, and a toxic corpus."""
    for room, word in (("distilled", "orchard"), ("samples", "market")):
        (tmp_path / room).mkdir()
        lines = [
            {"text": f"A story of the {word}, told on day {i} by the {word} itself.", "ended": True} for i in range(9)
        ]
        lines += [{"text": "-" * 40, "ended": False}]
        (tmp_path / room / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    news = [dict(zip(("text", "label", "source"), row, strict=True)) for row in zip(*articles(), strict=True)]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in news))
    (tmp_path / "toxic.txt").write_text(
        "All oafs spoil the bread.\nA story of the orchard, told on day 3 by the oafs.\n"
    )
    return make_run(tmp_path)


def make_run(tmp_path, **changes):
    config = settings.default_config()
    config.analyze.toxic_data = "text:{workdir}/toxic.txt"
    config.analyze.leaning = "jsonl:{workdir}/news.jsonl?label=label&source=source"
    config.analyze.texts = ("other=text:{workdir}/toxic.txt",)
    config.evaluate.other_scorers = ("again=lexicon",)
    config.analyze.update({"scorer": "lexicon", "resamples": 50, "keywords": 4, "neighbours": 2, **changes})
    return settings.parse_run(config, tmp_path)


def test_the_stage_writes_all_tables(run, capsys):
    (record,) = run_tasks(analyze.tasks(run))
    assert record["figures"]["distilled"] == 10 and record["figures"]["leaning_accuracy"] == 1.0
    assert "right on 100.0% of 90 articles by publishers it never saw" in capsys.readouterr().out
    directory = run.workdir / "analysis"
    found = json.loads((directory / "analysis.json").read_text())
    assert list(found["sets"]) == sorted(["distilled", "samples", "other"])
    distilled = found["sets"]["distilled"]
    assert distilled["source"] == "distilled:{workdir}/distilled/texts.jsonl"
    assert distilled["description"]["degenerate"]["no words"] == 1
    assert set(distilled["jaccard"]) == set(found["sets"]) - {"distilled"} | {"toxic_data"}
    assert distilled["copying"]["longest_run"] == 12 and distilled["copying"]["texts_with_shared"] == 9
    assert distilled["nearest"][0]["corpus_sentence"].endswith("told on day 3 by the oafs.")
    assert distilled["keywords"]["distinctive"][0]["word"] == "orchard"
    assert distilled["toxicity"]["mean"]["texts"] == 10
    assert distilled["toxicity_by"] == {"again": distilled["toxicity"]}
    assert distilled["leaning"]["probability"]["left"]["mean"] > 0.5
    assert distilled["leaning"]["difference"]["samples"]["high"] < 0  # significantly left of the samples
    with (directory / "texts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    assert float(rows[0]["left"]) + float(rows[0]["center"]) + float(rows[0]["right"]) == pytest.approx(1)
    for name in ("sets", "keywords", "leaning", "nearest"):
        assert len((directory / f"{name}.csv").read_text().splitlines()) > 3, name
    assert run_tasks(analyze.tasks(run)) == [record]  # complete
    with pytest.raises(UserError, match="keywords: was 4, now 5"):
        run_tasks(analyze.tasks(make_run(run.workdir, keywords=5)))


def test_the_stage_without_leaning_scorer_and_samples(run):
    (run.workdir / "samples" / "texts.jsonl").unlink()
    run_tasks(analyze.tasks(make_run(run.workdir, leaning="", scorer="", texts=())))
    found = json.loads((run.workdir / "analysis" / "analysis.json").read_text())
    assert list(found["sets"]) == ["distilled"] and found["leaning"] is None
    assert found["sets"]["distilled"]["toxicity"] is None
    assert not (run.workdir / "analysis" / "leaning.csv").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("toxic.txt",), "found 'toxic.txt', expected 'name=DATASET'"),
        (("samples=text:toxic.txt",), "the name 'samples' is taken"),
    ],
)
def test_mistakes_name_the_field(run, texts, message):
    with pytest.raises(UserError, match=f"config.analyze.texts: {message}"):
        run_tasks(analyze.tasks(make_run(run.workdir, texts=texts)))


def test_nothing_to_analyze(tmp_path):
    with pytest.raises(UserError, match="run `unidetox distill`"):
        run_tasks(analyze.tasks(make_run(tmp_path, texts=())))


@pytest.mark.slow
def test_the_papers_released_text_copies_nothing_and_leaning_of_real_news_is_hard(shared, tmp_path):
    """The released 640 texts against the toxic corpus; the leaning classifier on unseen publishers."""
    config = settings.default_config()
    config.data_dir = str(shared / "data")
    (released,) = (shared / "data" / "distilled").glob("*.csv")
    config.analyze.update({"texts": (f"released=distilled:{released}",), "leaning": "politics", "toxic_data": "dghs"})
    run_tasks(analyze.tasks(settings.parse_run(config, tmp_path)))
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert found["sets"]["released"]["description"]["texts"] == 640
    assert found["sets"]["released"]["copying"]["shared"] == 0
    assert found["leaning"]["articles"] == 1300 and found["leaning"]["publishers"] == 21
    assert found["leaning"]["majority"] == pytest.approx(599 / 1300)
    # Above guessing, and far from reliable: 0.499 was measured
    assert found["leaning"]["majority"] < found["leaning"]["accuracy"] < 0.6
