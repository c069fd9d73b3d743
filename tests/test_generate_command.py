"""`unidetox generate`, and its stream against `decoding.generate`."""

import io

import jax
import numpy as np
import pytest
from test_method import SENTENCES

import unidetox_jax as ud
from unidetox_jax import checkpoint, cli, decoding, models
from unidetox_jax.data import toymodels
from unidetox_jax.data.tokens import encode
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.decoding.stream import stream

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of two GPT-2 models with the same tokenizer and a chat template, and of a LLaMA with another one."""
    place = tmp_path_factory.mktemp("models")
    toymodels.write(place, SENTENCES)
    for name, family, seed in (("base", "gpt2", 0), ("toxic", "gpt2", 1), ("other", "llama", 2)):
        cfg = models.config_from_hf(place / family)
        tokenizer = checkpoint.load_tokenizer(place / family)
        tokenizer.chat_template = TEMPLATE if name != "other" else None
        checkpoint.save_hf(place / name, models.Model(models.init(cfg, jax.random.key(seed)), cfg), tokenizer)
    return place


def generate(place, capsys, *arguments, names="base,toxic"):
    """(exit code, standard output, error line)."""
    code = cli.main(["generate", f"--models={','.join(str(place / name) for name in names.split(','))}", *arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("unidetox:")]
    return code, captured.out, "".join(lines)


@pytest.mark.slow
def test_a_stream_equals_generate(pair):
    sources = [checkpoint.load(pair / name) for name in ("base", "toxic")]
    eos = list(range(3, 60))  # rows end at different steps
    settings = {"objective": objectives.get("contrastive", alpha=0.01), "warpers": [warpers.top_k(20)], "eos_id": eos}
    settings |= {"max_new_tokens": 12, "samples": 3, "seed": 5}
    prompts = np.array([[1, 9, 70], [1, 80, 8]], np.int32)
    whole = decoding.generate(sources, prompts, log_probabilities=True, **settings)
    streamed = list(stream(sources, prompts, **settings))
    assert len(streamed) == whole.lengths.max() and len(set(whole.lengths.tolist())) > 1
    live = np.stack([token.live for token in streamed])
    assert live.sum(0).tolist() == whole.lengths.tolist()
    np.testing.assert_array_equal(np.stack([token.ids for token in streamed]).T, whole.tokens[:, : len(streamed)])
    sums = sum(np.where(token.live, token.log_probabilities, 0) for token in streamed)
    np.testing.assert_allclose(sums / whole.lengths, whole.log_probabilities, rtol=1e-4)


def test_texts_equal_the_librarys(pair, capsys):
    expected = ud.generate(ud.load(pair / "base"), ["the baker of"], samples=2, max_new_tokens=8)[0]
    arguments = ["--prompt=the baker of", "--samples=2", "--max_new_tokens=8"]
    code, out, _ = generate(pair, capsys, *arguments, names="base")
    assert code == 0 and out == "> the baker of\n" + "\n--\n".join(expected) + "\n"


def test_prompts_come_from_standard_input_and_files(pair, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("the miller\nthe smith\n"))
    (tmp_path / "prompts.txt").write_text("the hill\n")
    (tmp_path / "prompts.jsonl").write_text('{"words": "the town"}\n')
    shown = []
    for spec in ("-", str(tmp_path / "prompts.txt"), f"jsonl:{tmp_path}/prompts.jsonl?text=words"):
        code, out, _ = generate(pair, capsys, f"--prompts={spec}", "--prompt=first", "--max_new_tokens=2")
        assert code == 0
        shown.append([line[2:] for line in out.splitlines() if line.startswith("> ")])
    assert shown == [["first", "the miller", "the smith"], ["first", "the hill"], ["first", "the town"]]


@pytest.mark.slow
def test_two_objectives_side_by_side_with_probabilities(pair, capsys):
    arguments = ["--prompt=the baker", "--max_new_tokens=6", "--compare=base", "--temperature=0"]
    code, out, _ = generate(pair, capsys, *arguments)
    title, *lines = out.splitlines()[1:]
    assert code == 0 and title.split()[0].startswith("contrastive(alpha=0.1") and len(lines) == 6
    base, toxic = (checkpoint.load(pair / name) for name in ("base", "toxic"))
    prompt = encode(checkpoint.load_tokenizer(pair / "base"), ["the baker"])
    chances = [
        np.asarray(jax.nn.softmax(models.forward(m.params, np.array(prompt), m.cfg)[0, -1])) for m in (base, toxic)
    ]
    scores = objectives.contrastive(*(np.log(p)[None] for p in chances), alpha=0.1)[0]
    expected = [p[int(scores.argmax())] for p in chances] + [chances[0].max()]
    found = [float(cell) for cell in lines[0].split() if cell.count(".") == 1 and cell[0] in "01"]
    np.testing.assert_allclose(found, expected, atol=6e-4)


def test_a_chat_prompt_is_a_users_turn(pair, capsys, monkeypatch):
    tokenizer = checkpoint.load_tokenizer(pair / "base")
    seen = []
    monkeypatch.setattr(
        "unidetox_jax.generate_command.stream", lambda *a, **k: seen.append(a[1].tolist()[0]) or iter(())
    )
    assert generate(pair, capsys, "--prompt=the hill", "--chat")[0] == 0
    turn = [{"role": "user", "content": "the hill"}]
    assert seen == [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)]


@pytest.mark.parametrize(
    ("names", "arguments", "words"),
    [
        ("base", [], "--prompt: none given"),
        ("base", ["--prompt=x", "--objective=contrastive"], "objective contrastive: found 1 models, expected 2"),
        ("base", ["--prompt=x", "--objective=contrastiv"], "did you mean 'contrastive'"),
        ("base,other", ["--prompt=x"], "have different tokenizers"),
        ("base,nobody", ["--prompt=x"], "nobody: no such directory"),
        ("other", ["--prompt=x", "--chat"], "has no chat template"),
        ("base", ["--prompt=x", "--top_p=2"], "top_p"),
        ("base", ["--prompt=x", "--max_new_tokens=999"], "the context of model 0"),
        ("base", ["--prompts=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line(pair, capsys, names, arguments, words):
    code, _, line = generate(pair, capsys, *arguments, names=names)
    assert code == 2 and words in line
