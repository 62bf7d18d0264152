"""What a teacher writes becomes a data set: what is asked and kept, how it is learnt, and that it is written once."""

import json

import pytest
import torch

import compress
from compress import answers
from compress.answers import Answers, answer_windows, answers_of, generate_texts, last_word
from compress.errors import CompressError, RecipeError, StartError
from compress.losses import Loss, Rationale
from compress.model import ModelHandle
from compress.passes.base import Context
from compress.pipeline import run
from compress.recipe import Recipe
from compress.teaching import TeacherSource
from compress.testing import save_tiny, tiny_model, tiny_tokenizer


class Scripted:
    """Stands in for `generate_texts`: says what the script says to a prompt, in turn; counts what it is asked."""

    def __init__(self, script):
        self.script, self.asked = script, []

    def __call__(self, model, tokenizer, prompts, options):
        self.asked += prompts
        return [self.script(prompt, number) for number, prompt in enumerate(prompts)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"add {n}", "completion": f" So {n + 1}."} for n in range(5)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def source():
    context = Context(original=lambda: tiny_model("llama"), tokenizer=tiny_tokenizer())
    return TeacherSource(None, ModelHandle.wrap(tiny_model("llama")), context)


def _right(prompt, number):
    n = int(prompt.split()[1])
    return f" {n} and one. So {n + 1}." if n % 2 else f" {n} and none. So {n}."


def test_only_right_answers_are_kept_and_reasons_are_parted_from_them(prompts, source, tmp_path, monkeypatch):
    script = Scripted(_right)
    monkeypatch.setattr(answers, "generate_texts", script)
    options = Answers(prompts=prompts, filter="answer", ask=" Why?")
    path, lines = answers_of(source, options, True, tmp_path / "kept", seed=0)
    assert script.asked == [f"add {n} Why?" for n in range(5)]
    assert lines == [
        {"prompt": f"add {n}", "completion": f" So {n + 1}.", "rationale": f" {n} and one."} for n in (1, 3)
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert not list(path.parent.glob("*.part"))
    _, plain = answers_of(source, Answers(prompts=prompts, filter="answer"), False, tmp_path / "kept", seed=0)
    assert plain == [{"prompt": f"add {n}", "completion": f" {n} and one. So {n + 1}."} for n in (1, 3)]


def test_a_data_set_is_written_once_and_again_for_other_settings(prompts, source, tmp_path, monkeypatch):
    script = Scripted(_right)
    monkeypatch.setattr(answers, "generate_texts", script)
    first, _ = answers_of(source, Answers(prompts=prompts), False, tmp_path, seed=0)
    again, _ = answers_of(source, Answers(prompts=prompts), False, tmp_path, seed=0)
    assert (first, len(script.asked)) == (again, 5)
    other, _ = answers_of(source, Answers(prompts=prompts, max_tokens=9), False, tmp_path, seed=0)
    assert other != first


def test_a_killed_run_goes_on_where_it_was(prompts, source, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "SHARD", 2)
    monkeypatch.setattr(answers, "generate_texts", Scripted(_right))
    whole, lines = answers_of(source, Answers(prompts=prompts), False, tmp_path / "whole", seed=0)

    def dies(prompt, number):
        if "3" in prompt:
            raise KeyboardInterrupt
        return _right(prompt, number)

    monkeypatch.setattr(answers, "generate_texts", Scripted(dies))
    with pytest.raises(KeyboardInterrupt):
        answers_of(source, Answers(prompts=prompts), False, tmp_path / "killed", seed=0)
    script = Scripted(_right)
    monkeypatch.setattr(answers, "generate_texts", script)
    path, resumed = answers_of(source, Answers(prompts=prompts), False, tmp_path / "killed", seed=0)
    assert script.asked == ["add 2", "add 3", "add 4"]
    assert resumed == lines
    assert path.read_bytes() == whole.read_bytes()


def test_several_answers_are_drawn_and_the_likeliest_share_is_kept(prompts, source, tmp_path, monkeypatch):
    script = Scripted(lambda prompt, number: f" answer {number % 4}")
    monkeypatch.setattr(answers, "generate_texts", script)
    options = Answers(prompts=prompts, n=4, sampling="sample", filter="likelihood", keep=0.25)
    _, lines = answers_of(source, options, False, tmp_path, seed=0)
    assert len(script.asked) == 20
    assert len(lines) == 5
    from compress.measure.items import encode, score

    def likelihood(line):
        request = encode(source.tokenizer, line["prompt"], line["completion"])
        return score(source.model, [request])[0].log_likelihood / (len(request.ids) - request.start)

    everything = [{"prompt": f"add {n}", "completion": f" answer {k}"} for n in range(5) for k in range(4)]
    assert {json.dumps(line) for line in sorted(everything, key=likelihood)[-5:]} == {json.dumps(x) for x in lines}


def test_the_model_itself_is_asked_and_writes_up_to_a_stop_or_an_end():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = Answers(prompts="x", max_tokens=40, sampling="sample", stop=["a", "e", "1"])
    torch.manual_seed(0)
    texts = generate_texts(model, tokenizer, ["ab", "longer prompt", "c"] * 4, options)
    assert any(text is not None for text in texts)
    assert not any(stop in text for text in texts if text for stop in options.stop)
    greedy = Answers(prompts="x", max_tokens=40, stop=list("abcdefghijklmnopqrstuvwxyz"))
    alone = [generate_texts(model, tokenizer, [prompt], greedy)[0] for prompt in ("ab", "longer prompt")]
    assert generate_texts(model, tokenizer, ["ab", "longer prompt"], greedy) == alone


def test_windows_label_the_answers_and_with_reasons_have_two_tasks():
    tokenizer = tiny_tokenizer()
    lines = [{"prompt": "ab ", "completion": "cd", "rationale": "efg"}, {"prompt": "h", "completion": " i"}]
    windows, tasks = answer_windows(lines, tokenizer, Rationale(rationale_prefix="why "), 64, "x")
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(windows.tokens, windows.mask, strict=True)]
    learnt = [tokenizer.decode(row[row != -100]) for row in windows.labels]
    assert texts == ["<bos>ab cd<eos>", "<bos>why ab efg<eos>", "<bos>h i<eos>"]
    assert learnt == [" cd<eos>", " efg<eos>", " i<eos>"]
    assert tasks.tolist() == [0, 1, 0]
    plain, none = answer_windows(lines, tokenizer, None, 64, "x")
    assert (len(plain), none) == (2, None)
    assert plain.fingerprint != windows.fingerprint


@pytest.mark.parametrize(("text", "word"), [(" So 132.", "132"), ("The Answer is Paris!", "paris"), ("", "")])
def test_the_last_word_is_what_an_answer_comes_down_to(text, word):
    assert last_word(text) == word


def test_no_answer_left_says_why(prompts, source, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "generate_texts", Scripted(lambda prompt, number: "wrong"))
    with pytest.raises(CompressError, match=r"of 5 answers none is left \(filter: answer"):
        answers_of(source, Answers(prompts=prompts, filter="answer"), False, tmp_path, seed=0)


def test_a_student_learns_answers_and_reasons(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "generate_texts", Scripted(_right))
    options = {"answers": {"prompts": prompts}, "cache": str(tmp_path), "steps": 12, "learning_rate": 3e-3}
    for losses in (None, ["labels", {"rationale": {"weight": 0.5}}], ["kl"]):
        chosen = None if losses is None else [Loss.model_validate(loss) for loss in losses]
        result = compress.Distill(**options, losses=chosen, student={"layers": [0, 2]})(
            tiny_model("llama"), tokenizer=tiny_tokenizer(), original=tiny_model("llama")
        )
        assert result.measurements["steps"] == 12
        assert result.measurements["losses"][-1]["loss"] < result.measurements["losses"][0]["loss"]
        assert result.measurements["answers"]["windows"] == (10 if losses and len(losses) == 2 else 5)


def test_answers_of_a_teacher_with_another_tokenizer_are_learnt(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "generate_texts", Scripted(_right))
    other = save_tiny(tmp_path / "other", vocab_size=120)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    result = compress.Distill(teacher=str(other), answers={"prompts": prompts}, steps=4, cache=str(tmp_path))(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), original=tiny_model("llama")
    )
    assert result.measurements["steps"] == 4


def test_a_recipe_finds_its_prompts_beside_it_and_refuses_what_is_not_there(prompts, tmp_path, unverified, monkeypatch):
    monkeypatch.setattr(answers, "generate_texts", Scripted(_right))
    folder = save_tiny(tmp_path / "model")
    values = {
        "model": str(folder), "benchmark": False, "output": str(tmp_path / "out"),
        "passes": [{"distill": {"answers": {"prompts": "prompts.jsonl"}, "steps": 2, "cache": "here"}}],
    }  # fmt: skip
    recipe = Recipe.from_dict(values, base=tmp_path)
    assert recipe.passes[0].answers.prompts == prompts
    report = run(recipe)
    assert report.stages[0].measurements["answers"]["file"].startswith(str(tmp_path / "here"))
    values["passes"][0]["distill"]["answers"]["prompts"] = "promts.jsonl"
    with pytest.raises(RecipeError, match=r"answers.prompts: no such file: .*promts.jsonl"):
        Recipe.from_dict(values, base=tmp_path)


def test_prompts_that_are_measured_are_refused(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "generate_texts", Scripted(_right))
    context = Context(
        original=lambda: tiny_model("llama"), tokenizer=tiny_tokenizer(),
        tasks={"sums": [{"prompt": "add 3", "completion": " So 4."}]},
    )  # fmt: skip
    with pytest.raises(StartError, match="1 of 5 are test items of the benchmark as well"):
        compress.Distill(answers={"prompts": prompts}, cache=str(tmp_path)).run(
            ModelHandle.wrap(tiny_model("llama")), context
        )


def test_reasons_need_prompts():
    with pytest.raises(StartError, match="the loss rationale needs answers"):
        compress.Distill(losses=[Loss.model_validate("rationale")])(
            tiny_model("llama"), training=torch.ones(2, 4).long(), original=tiny_model("llama")
        )
