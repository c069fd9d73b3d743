"""The report: changes against hand-computed values, findings, and the page in a real browser."""

import csv
import dataclasses
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import report_helpers as helpers
from conftest import HANGS
from matplotlib import image

from unidetox_jax import recipe, storage
from unidetox_jax.errors import UserError
from unidetox_jax.report import findings, page, results, tables
from unidetox_jax.report.results import Cell, Quantity
from unidetox_jax.stages import report, settings
from unidetox_jax.stages.task import run_tasks

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete run with its report."""
    run = helpers.make_run(tmp_path_factory.mktemp("whole"), note=f"A note: {helpers.HOSTILE}")
    helpers.write_whole_run(run)
    run_tasks(report.tasks(run))
    return run


def sentences(rows):
    quantities = results.quantities([row.evaluation for row in rows])
    return " ".join(finding.sentence for finding in findings.statements(rows, quantities, None))


def page_of(run):
    return (run.workdir / "report" / "index.html").read_text()


# ------------------------------------------------------------------------------------------------ the figures


def test_a_change_without_an_interval_is_not_significant():
    assert tables.percent({"percent": 50.0, "low": None, "high": None}) == "+50.0\u00a0%"
    assert tables.bounds({"percent": 50.0, "low": None, "high": None}) == ""
    bounds = [(-2.0, -1.0), (-1.0, 1.0), (1.0, 2.0), (0.0, 1.0), (None, None)]
    assert [results.significant_sign({"low": low, "high": high}) for low, high in bounds] == [-1, 0, 1, 0, 0]


def test_rows_are_in_the_configurations_order_with_changes_from_the_original(whole):
    rows = results.rows(report.load_evaluations(whole))
    order = [(row.name, row.form) for row in rows]
    gpt2 = [("tiny-gpt2", form) for form in ("original", "detoxified", "control")]
    assert order == [*gpt2, ("tiny-llama", "original"), ("tiny-llama", "detoxified")]
    before, after = rows[0].cells, rows[1].cells
    assert before["tp_id"].change is None
    for key in ("tp_id", "emt_ood", "perplexity", "dist2", "mmlu_paper:1"):
        expected = 100 * (after[key].mean / before[key].mean - 1)
        assert after[key].change["percent"] == pytest.approx(expected, abs=0.05), key
    assert after["tp_id"].change["high"] < 0
    assert after["mmlu_paper:1"].change["low"] is None  # accuracies of one set of questions each


def test_evaluations_of_different_protocols_have_no_change(tmp_path):
    run = helpers.make_run(tmp_path)
    helpers.write_evaluation(run, "tiny-gpt2", "original", 0.45)
    helpers.write_evaluation(run, "tiny-gpt2", "detoxified", 0.3, runs=2)
    rows = results.rows(report.load_evaluations(run))
    assert all(cell.change is None for row in rows for cell in row.cells.values())
    assert "No comparable evaluation of the model as published: tiny-gpt2" in findings.warnings(rows, None, None)[0]
    assert "No model was evaluated both before and after" in sentences(rows)


def test_pooled_change_is_that_of_the_mean_model(whole):
    evaluations = report.load_evaluations(whole)
    pairs = results.pairs(evaluations, "original", "detoxified")
    assert [pair[0].name for pair in pairs] == ["tiny-gpt2", "tiny-llama"]
    means = [np.mean([pair[side].metrics["toxicity"]["id"]["tp"]["mean"] for pair in pairs]) for side in (0, 1)]
    assert results.pooled_change(pairs)["tp_id"]["percent"] == pytest.approx(100 * (means[1] / means[0] - 1))


def test_results_csv_has_every_number(whole):
    rows = list(csv.DictReader(io.StringIO((whole.workdir / "report" / "results.csv").read_text())))
    by_key = {(row["model"], row["form"], row["quantity"]): row for row in rows}
    assert len(by_key) == len(rows) == 5 * (4 + 2 + 2 + 3 + 2 + 2 * 4)  # without those over all prompts
    metrics = storage.read_json(whole.workdir / "evaluation" / "tiny-llama.detoxified" / "metrics.json")
    row = by_key["tiny-llama", "detoxified", "tp_ood"]
    assert float(row["mean"]) == metrics["toxicity"]["ood"]["tp"]["mean"]
    assert float(row["change_low"]) < float(row["change_percent"]) < float(row["change_high"]) < 0
    assert (row["prompts"], row["texts"]) == ("20", "300")
    assert by_key["tiny-llama", "detoxified", "text_perplexity"]["texts"] == ""  # not of the continuations
    row = by_key["tiny-gpt2", "original", "emt of rivers"]
    metrics = storage.read_json(whole.workdir / "evaluation" / "tiny-gpt2" / "metrics.json")
    assert float(row["mean"]) == metrics["toxicity"]["rivers"]["emt"]["mean"]


def test_latex_escapes_and_aligns(whole):
    text = (whole.workdir / "report" / "results.tex").read_text()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 6 and {line.count("&") for line in lines} == {12}
    assert page.escape_latex(r"a_b&50%{x}\y~z^") == (
        r"a\_b\&50\%\{x\}\textbackslash{}y\textasciitilde{}z\textasciicircum{}"
    )
    assert "−" not in text and text.endswith("}\n")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((-38.71, -41.2, 2.0), "−38.7\u00a0% [−41.2, +2.0]"),
        ((1.2, None, None), "+1.2\u00a0% "),
        ((-0.04, -0.03, 0.0), "+0.0\u00a0% [+0.0, +0.0]"),
    ],
)
def test_a_change_as_text(numbers, text):
    change = dict(zip(("percent", "low", "high"), numbers, strict=True))
    assert f"{tables.percent(change)} {tables.bounds(change)}" == text


def test_a_value_as_text():
    assert tables.value(Cell(0.42, 0.0112), Quantity("tp_id", "TP", True)) == "0.420 ± 0.011"
    assert tables.value(Cell(17.28, 0.0), Quantity("perplexity", "PPL", True, 2)) == "17.28"


def test_the_terminals_table_fits_and_has_the_findings(whole):
    text = report.summary_table(whole)
    lines = text.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("-", "!"))) <= 160
    assert "samples-only control" in text and "EMT" not in lines[0]
    assert any(line.startswith("- On prompts about groups in the toxic model's training text") for line in lines)
    assert any(line.endswith("not what other seeds of distillation and training would give.") for line in lines)


# --------------------------------------------------------------------------------------------------- findings


def rows_of(tmp_path, **evaluations):
    """Rows of tiny-gpt2: form → arguments of write_evaluation."""
    run = helpers.make_run(tmp_path)
    for seed, (form, arguments) in enumerate(evaluations.items()):
        helpers.write_evaluation(run, "tiny-gpt2", form, **{"seed": seed, **arguments})
    return results.rows(report.load_evaluations(run))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (0.5, 0.3, "a toxic continuation fell from"),
        (0.4, 0.4, "a toxic continuation did not change beyond chance, from"),
        (0.3, 0.5, "a toxic continuation rose from"),
    ],
)
def test_only_a_fall_is_reported_as_one(tmp_path, before, after, sentence):
    text = sentences(rows_of(tmp_path, original={"level": before}, detoxified={"level": after}))
    assert sentence in text and ("a toxic continuation fell" in text) == (after < before)


@pytest.mark.parametrize(
    ("control", "sentence"),
    [
        (0.5, "in this run the effect is due to the contrast"),
        (0.4, "the effect of the contrast itself is not shown"),
        (0.3, "so the contrast made things worse"),
    ],
)
def test_the_control_decides_what_the_effect_is_due_to(tmp_path, control, sentence):
    rows = rows_of(tmp_path, original={"level": 0.5}, detoxified={"level": 0.4}, control={"level": control})
    assert sentence in sentences(rows)


def test_missing_perplexity_is_reported(tmp_path):
    rows = rows_of(tmp_path, original={"level": 0.5, "ppl": 0}, detoxified={"level": 0.3, "ppl": 0})
    assert "Perplexity was not measured" in sentences(rows)
    assert "perplexity" not in rows[1].cells


def test_a_warning_about_degenerate_continuations(tmp_path):
    rows = rows_of(tmp_path, original={"level": 0.5}, detoxified={"level": 0.3, "degenerate": 0.3})
    assert "are degenerate than before: tiny-gpt2 (detoxified) 0.0% → " in " ".join(findings.warnings(rows, None, None))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        ({"toxic": 0.09}, "is toxic more often (9.0% of its texts) than the base model's own samples (2.0%)"),
        (
            {"toxic": 0.09, "samples_toxic": 0.2},
            "9.0% of the detoxifying texts are themselves toxic by the scorer (the base model's own samples: 20.0%)",
        ),
        ({"degenerate": 100}, "15.6% of the distilled texts are degenerate"),
        ({"longest": 40}, "A run of 40 words of the distilled text also occurs in the toxic corpus"),
    ],
)
def test_warnings_about_the_text(tmp_path, changes, sentence):
    run = helpers.make_run(tmp_path)
    helpers.write_analysis(run, **changes)
    found = findings.warnings([], storage.read_json(tmp_path / "analysis" / "analysis.json"), None)
    assert len(found) == bool(sentence) and sentence in " ".join(found)
    run_tasks(report.tasks(run))
    assert ('class="warning"' in page_of(run)) == bool(sentence)


def test_without_an_analysis_the_distill_stages_figures_give_the_warnings(tmp_path):
    run = helpers.make_run(tmp_path)
    helpers.write_distilled(run, share_toxic=0.3)
    run_tasks(report.tasks(run))
    page = page_of(run)
    assert "30.0% of the detoxifying texts are themselves toxic by the scorer" in page
    assert "Counted by the distill stage" in page


# --------------------------------------------------------------------------------------------------- the page


class Outline(html.parser.HTMLParser):
    """Tags, their attributes, and whether they nest."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.wrong = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in ("path", "use"):
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_self_contained_and_escapes_all_data(whole):
    page = page_of(whole)
    outline = Outline()
    outline.feed(page)
    assert not outline.wrong and not outline.open
    names = [tag for tag, _ in outline.tags]
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(names)
    assert "<script" not in page and "<b>lantern" not in page
    assert page.count("&lt;script&gt;alert") > 5  # the note, examples, settings
    for _, attributes in outline.tags:
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith("#"), attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", page)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    linked = {attributes["href"][1:] for tag, attributes in outline.tags if tag == "a"}
    assert linked <= set(ids) and len(linked) == 7


def test_the_page_is_complete(whole):
    page = page_of(whole)
    assert page.count("<svg") == 5 and page.count('class="model"') == 2
    examples = page[page.index('id="examples"') :]
    assert examples.count("<blockquote") >= 6 * 3
    # Text of models and of the toxic corpus is folded
    visible = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    assert "<blockquote" not in visible and "The oaf is dull." not in visible and "The oaf is dull." in page
    assert "<details open" not in page
    assert 'aria-label="Training"' in page and 'aria-label="Training"' not in visible  # diagnosis, not result
    assert "80 × 5 × 3" in page and "1,200 of 1,200" in page
    assert "Of 700 generated texts 42 were rejected:\n2 copied, 40 toxic by tweets.</p>" in page
    assert "<td>30.0% and 10.0%</td>" in page and "<td>−0.02</td>" in page
    assert "lexicon and tweets agree on single continuations with a Cohen&#39;s κ of −0.02 (1: always" in page
    for name in ("tradeoff", "changes", "categories", "leaning", "training"):
        picture = image.imread(whole.workdir / "report" / "plots" / f"{name}.png")
        assert picture[..., :3].std() > 0.03, name


def test_examples_are_spread_over_categories():
    categories = ["b", "b", "b", "c", "a", "a", "a", "a", "a", "a"]
    assert report._spread(categories, 5) == [0, 2, 4, 6, 8]  # in order: a at 4 to 9, b at 0 to 2, c at 3
    assert report._spread(categories, 6) == [0, 2, 4, 5, 7, 9]
    assert report._spread(["", ""], 6) == [0, 1]


def test_settings_are_shown_as_differences_from_the_defaults():
    def record(stage, **changed):
        defaults = dataclasses.asdict(settings.SECTIONS[stage.partition(" ")[0]]())
        return {"stage": stage, "settings": json.loads(json.dumps({**defaults, "dtype": "", **changed}))}

    adapter = dataclasses.asdict(recipe.Lora(rank=4))
    trained = [record(f"detoxify {name}", model=name, learning_rate=1e-3, tokens_kept=9, lora=adapter) for name in "ab"]
    control = {**trained[0], "stage": "control a"}  # has detoxify's settings
    distilled = [record("distill", num_texts=8), record("distill control", num_texts=8, models=["base"])]
    other = {"stage": "pretrain world", "settings": {"world_seed": 3}}
    assert [tuple(row.values()) for row in report.changed_settings([other, *distilled, *trained, control])] == [
        ("pretrain", "world_seed=3 (0)"),
        ("distill", "num_texts=8 (640)"),
        ("distill control", 'models=["base"] (["base", "toxic"])'),
        ("detoxify", "learning_rate=0.001 (5e-05), lora.rank=4 (0), tokens_kept=9"),
        ("control", "learning_rate=0.001 (5e-05), lora.rank=4 (0), tokens_kept=9"),
    ]


def test_the_report_is_redone_when_its_inputs_change(tmp_path):
    run = helpers.make_run(tmp_path)
    run_tasks(report.tasks(run))
    assert "Nothing has been evaluated or analysed yet" in page_of(run)
    assert not (tmp_path / "report" / "results.csv").exists()
    helpers.write_evaluation(run, "tiny-gpt2", "original", 0.45, ppl=0, mmlu=0)
    run_tasks(report.tasks(run))  # redone without --force
    page = page_of(run)
    assert "No model was evaluated both before and after" in page
    assert "The trade-off" not in page and "By category" in page
    helpers.write_evaluation(run, "elsewhere", "original", 0.45)  # not a target of the configuration
    (record,) = run_tasks(report.tasks(run))
    assert "elsewhere" in page_of(run) and "The trade-off" in page_of(run)
    assert run_tasks(report.tasks(run)) == [record]  # nothing changed
    shutil.rmtree(tmp_path / "evaluation")
    run_tasks(report.tasks(run))
    assert not (tmp_path / "report" / "results.csv").exists()  # the earlier report's


def test_examples_can_be_switched_off(tmp_path):
    run = helpers.make_run(tmp_path, examples=0)
    helpers.write_evaluation(run, "tiny-gpt2", "original", 0.45)
    run_tasks(report.tasks(run))
    assert 'id="examples"' not in page_of(run)


def test_an_unfinished_evaluation_is_left_out_and_a_broken_one_is_an_error(tmp_path):
    run = helpers.make_run(tmp_path)
    helpers.write_evaluation(run, "tiny-gpt2", "original", 0.45)
    helpers.write_evaluation(run, "tiny-llama", "original", 0.45)
    (tmp_path / "evaluation" / "tiny-llama" / "stage.json").unlink()
    assert [one.name for one in report.load_evaluations(run)] == ["tiny-gpt2"]
    (tmp_path / "evaluation" / "tiny-gpt2" / "per_prompt.npz").write_text("no arrays")
    with pytest.raises(UserError, match="tiny-gpt2: not an evaluation"):
        run_tasks(report.tasks(run))


# ------------------------------------------------------------------------------------------- in a real browser

# Measures the page in frames of a desktop's and a phone's width: Chromium's window is never narrower than 500 pixels
MEASURE = """<!DOCTYPE html><title>measure</title><iframe style="width:1300px;height:4000px;border:0" src="index.html">
</iframe><iframe style="width:390px;height:4000px;border:0" src="index.html"></iframe><p id="result"></p><script>
function measure(page) {
  const root = page.documentElement, table = page.querySelector("#results table"), frame = table.parentElement;
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") || e.matches("svg"))
    .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.outerHTML.slice(0, 80));
  const text = [...page.querySelectorAll(".plots svg text")].map(e => e.getBoundingClientRect().height);
  const columns = () => [...table.rows[0].cells].filter(e => e.offsetWidth).length;
  const found = {width: root.clientWidth, scrolls: root.scrollWidth > root.clientWidth, wide, rows: table.rows.length,
    table_scrolls: frame.scrollWidth > frame.clientWidth, columns: columns(), smallest_text: Math.min(...text),
    plots: [...page.querySelectorAll("figure svg")].filter(e => e.checkVisibility()).length};
  page.getElementById("more-columns").click();
  return {...found, more_columns: columns()};
}
onload = () => {
  document.getElementById("result").textContent = JSON.stringify(
    [...document.querySelectorAll("iframe")].map(frame => measure(frame.contentDocument)));
};
</script>"""


def chromium(tmp_path, *arguments):
    if not CHROMIUM:
        pytest.skip("no Chromium here (apt-get install chromium, or set CHROMIUM)")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-sync --disable-background-networking "
        "--disable-component-update --disable-dev-shm-usage --no-first-run --hide-scrollbars "
        "--allow-file-access-from-files"
    ).split()
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True).stdout


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)])
def test_a_browser_shows_the_page_wide_and_narrow_light_and_dark(whole, tmp_path, width, dark):
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    address = f"file://{whole.workdir}/report/index.html"
    chromium(tmp_path, *scheme, f"--window-size={width},2400", f"--screenshot={shot}", address)
    picture = image.imread(shot)[..., :3]
    assert picture.shape[:2] == (2400, width)
    assert np.median(picture) < 0.2 if dark else np.median(picture) > 0.8
    # No blank region below the title
    bands = picture.reshape(8, 300, width, 3).std(axis=(1, 2, 3))
    assert (bands > 0.01).all(), bands


def test_nothing_overflows_and_the_results_fit_a_desktop(whole, tmp_path):
    directory = pathlib.Path(shutil.copytree(whole.workdir / "report", tmp_path / "copy"))
    (directory / "measure.html").write_text(MEASURE)
    dom = chromium(tmp_path, "--window-size=1800,4200", "--dump-dom", f"file://{directory}/measure.html")
    desktop, phone = json.loads(html.unescape(re.search(r'<p id="result">(.*?)</p>', dom, re.S)[1]))
    assert (desktop["width"], phone["width"]) == (1300, 390)
    assert phone["table_scrolls"] and not desktop["table_scrolls"]
    for found in (desktop, phone):
        assert not found["scrolls"] and found["wide"] == []
        assert (found["rows"], found["columns"], found["more_columns"]) == (6, 7, 12)
        assert found["plots"] == 4 and found["smallest_text"] >= 9  # the fifth, training, is folded
