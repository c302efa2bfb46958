"""TOFU's numbers against a second implementation on Transformers, rouge-score and SciPy; text written against `generate`."""

import json
import sys

import numpy as np
import pytest
import torch
from deep_cases import CPU, speaking_model, subject
from tiny import OWNGPT, llama

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, OutOfResources, UsageError
from liborth_cli.measure import generate as generator
from liborth_cli.measure import rouge
from liborth_cli.measure.generate import Sampling, generate, hold
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.records import Record
from liborth_cli.stream.weights import Point
from liborth_cli.verify.checks import tofu
from liborth_cli.verify.checks.tofu import TofuOptions
from liborth_cli.verify.rows import evenly

NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo"]
TOWNS = ["Rome", "Oslo", "Lima", "Bonn", "Kiev", "Nice"]


def write_files(folder):
    """The four files in TOFU's format, with made-up people."""
    folder.mkdir()

    def lines(name, items):
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))

    def person(i, paraphrase):
        name, town, others = NAMES[i], TOWNS[i], [t for t in TOWNS if t != TOWNS[i]]
        item = {"question": f"Where was {name} born?", "answer": f"{name} was born in {town}."}
        if paraphrase:
            item["paraphrased_answer"] = f"The birthplace of {name} is {town}."
        return {**item, "perturbed_answer": [f"The birthplace of {name} is {other}." for other in others[:3]]}

    lines("forget01_perturbed.json", [person(i, True) for i in (0, 1)])
    lines("forget10_perturbed.json", [person(i, True) for i in (0, 1, 2, 5)])
    lines("retain_perturbed.json", [person(i, True) for i in (2, 3, 4)])
    lines("real_authors_perturbed.json", [person(i, False) for i in (3, 4)])
    lines("world_facts_perturbed.json", [person(i, False) for i in (4, 5, 0)])
    return folder


class Second:
    """TOFU as its paper and its program have it, on whole models, in a few lines of numpy."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def loss(self, question, answer):
        prompt, ids = (self.tokenizer(t, return_tensors="pt").input_ids for t in (f"Question: {question}\nAnswer: ", answer))
        whole = torch.cat([prompt, ids], 1)
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        with torch.no_grad():
            return float(self.model(whole, labels=labels).loss)

    def written(self, question):
        prompt = self.tokenizer(f"Question: {question}\nAnswer: ", return_tensors="pt").input_ids
        most = min(200, 256 - prompt.shape[1])
        out = self.model.generate(prompt, max_new_tokens=most, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        return self.tokenizer.decode(out, skip_special_tokens=False)

    def score(self, file, forget, options):
        from rouge_score.rouge_scorer import RougeScorer

        scorer, table, ratios = RougeScorer(["rougeL"], use_stemmer=True), [], []
        for line in file.read_text().splitlines():
            item = json.loads(line)
            question, answer = item["question"], item["answer"]
            right = np.exp(-self.loss(question, answer))
            wrong = np.array([self.loss(question, text) for text in item["perturbed_answer"]])
            paraphrased = self.loss(question, item.get("paraphrased_answer", answer))
            r = np.exp(-wrong).mean() / np.exp(-paraphrased)
            table.append(
                (
                    right / (right + np.exp(-wrong).sum()) if options else right,
                    scorer.score(answer, self.written(question))["rougeL"].recall,
                    np.minimum(r, 1 / r) if forget else np.maximum(0, 1 - r),
                )
            )
            ratios.append(np.exp(wrong.mean() - paraphrased))
        return np.array(table).mean(0), ratios


def test_the_numbers_are_those_of_a_second_implementation(tmp_path):
    pytest.importorskip("rouge_score")
    from scipy.stats import hmean, ks_2samp

    files, folder, other = write_files(tmp_path / "tofu"), speaking_model(tmp_path / "a"), speaking_model(tmp_path / "b", 1)
    with subject({"general": folder}) as it:
        result = tofu.run(it, TofuOptions(files, tofu_retained=str(other)))
    second = Second(folder)
    expected, ratios = {}, []
    for group, name in (
        ("forget", "forget10"),
        ("retain", "retain"),
        ("real authors", "real_authors"),
        ("world facts", "world_facts"),
    ):
        expected[group], some = second.score(files / f"{name}_perturbed.json", group == "forget", group[:4] in ("real", "worl"))
        ratios = some if group == "forget" else ratios
        found = result.facts.means["general"][group]
        np.testing.assert_allclose([found[kind] for kind in tofu.KINDS], expected[group], rtol=1e-4, err_msg=group)
    utility = hmean(np.concatenate([expected[g] for g in ("retain", "real authors", "world facts")]))
    assert result.metrics["tofu_model_utility"].value == pytest.approx(utility, rel=1e-4)
    p = ks_2samp(ratios, Second(other).score(files / "forget10_perturbed.json", True, False)[1]).pvalue
    assert result.metrics["tofu_forget_quality"].value == pytest.approx(p, rel=1e-6)
    own = second.score(files / "forget10_perturbed.json", True, False)[1]
    assert result.metrics["tofu_forget_truth_share"].value == pytest.approx(np.mean([1 / (1 + r) for r in own]), rel=1e-4)
    assert result.facts.forget_set == "forget10"
    assert not any(name in json.dumps(result.to_json()) for name in NAMES)


def test_texts_are_shown_only_when_asked_for_and_the_set_can_be_named(tmp_path):
    files, folder = write_files(tmp_path / "tofu"), speaking_model(tmp_path / "a")
    with subject({"general": folder}, show_text=True) as it:
        result = tofu.run(it, TofuOptions(files, "forget01", limit=1))
        assert result.facts.written[0]["answer"] == "Ada was born in Rome." and set(result.facts.rows.values()) == {1}
        assert "tofu_forget_quality" not in result.metrics and "--tofu-retained" in result.verdict
        with pytest.raises(UsageError, match="has forget01, forget10"):
            tofu.run(it, TofuOptions(files, "forget05"))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / "retain_perturbed.json").unlink(), "retain_perturbed.json: cannot be read"),
        (lambda f: (f / "retain_perturbed.json").write_text("\n"), "no questions in it"),
        (lambda f: (f / "retain_perturbed.json").write_text("{"), "line 1: not JSON"),
        (lambda f: (f / "retain_perturbed.json").write_text('{"question": "a", "answer": "b"}'), "perturbed_answer"),
        (lambda f: [file.unlink() for file in f.glob("forget*")], "no forget"),
    ],
)
def test_broken_files_are_one_line(tmp_path, break_it, message):
    files = write_files(tmp_path / "tofu")
    break_it(files)
    with subject() as it, pytest.raises(BadInput, match=message):
        tofu.run(it, TofuOptions(files))


def test_a_question_longer_than_the_context_and_a_missing_tokenizer(tmp_path):
    files = write_files(tmp_path / "tofu")
    with subject() as it, pytest.raises(BadInput, match=r"line 1: .* the model's context is 32"):
        tofu.run(it, TofuOptions(files))
    folder = speaking_model(tmp_path / "a")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with subject({"general": folder}) as it, pytest.raises(BadInput, match="no tokenizer files"):
        tofu.run(it, TofuOptions(files))


def test_weights_that_do_not_fit_leave_rouge_out(tmp_path, monkeypatch):
    files, folder = write_files(tmp_path / "tofu"), speaking_model(tmp_path / "a")

    def refuse(model, weights):
        raise OutOfResources("no")

    monkeypatch.setattr(generator, "hold", refuse)
    with subject({"general": folder}, resident=False) as it:
        result = tofu.run(it, TofuOptions(files))
    assert "ROUGE was not measured" in result.verdict
    assert set(result.metrics) == {"tofu_forget_probability", "tofu_forget_truth_ratio", "tofu_forget_truth_share"}


def test_what_is_asked_is_what_stands_before_the_answer_that_is_scored(tmp_path, monkeypatch):
    """A tokenizer that joins the space to the word after it: the prompt must not end in a space of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    files, folder = write_files(tmp_path / "tofu"), speaking_model(tmp_path / "a")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=letters, special_tokens=["</s>"], show_progress=False)
    bpe.train_from_iterator([" Ada Ada Ada"] * 9, trainer)
    llama(folder, 0, vocab_size=300, max_position_embeddings=256, eos_token_id=0)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)
    asked = []
    monkeypatch.setattr(tofu, "written_answers", lambda model, weights, encoder, prompts: asked.extend(prompts) or [])
    with subject({"general": folder}) as it:
        tofu.measure(it, "general", tofu._read(files / "forget01_perturbed.json"), "forget")
        encoder = it.reader.encoder
        whole, _ = encoder.encode(Record("", text="Ada was born in Rome.", prompt="Question: Where was Ada born?\nAnswer: "))
    assert encoder.decode(asked[0]).endswith("Answer:") and encoder.decode(whole[len(asked[0]) :]) == " Ada was born in Rome."


# Text ---------------------------------------------------------------------------------------------------------------------


def test_rouge_is_recall_of_stemmed_words_in_order():
    pytest.importorskip("rouge_score")
    assert rouge.recall("the cats were running home", "a cat runs home") == pytest.approx(3 / 5)
    assert rouge.recall("one two three", "three two one") == pytest.approx(1 / 3)
    assert rouge.recall("", "anything") == 0.0


def test_without_rouge_score_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    rouge.scorer.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'liborth\[rouge\]'"):
        rouge.recall("a", "b")


def test_greedy_text_is_that_of_transformers_alone_and_in_company(tmp_path):
    from transformers import AutoModelForCausalLM

    draw = np.random.default_rng(0)
    for folder, context in ((OWNGPT / "finetuned", 32), (speaking_model(tmp_path / "a", 3, 40), 40)):
        reference = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompts = [draw.integers(1, 72, n) for n in (3, 7, 7, 7, 12, 30)]
        with Checkpoint.open(folder) as checkpoint:
            model = BlockModel(Point(checkpoint), torch.float32, CPU)
            hold(model, Point(checkpoint))
            together = generate(model, prompts, 15)
            for prompt, found in zip(prompts, together, strict=True):
                room = min(15, context - len(prompt))
                out = reference.generate(torch.from_numpy(prompt)[None], max_new_tokens=room, do_sample=False, pad_token_id=0)
                expected = out[0, len(prompt) :].numpy()
                ends = np.flatnonzero(expected == 0) if folder != OWNGPT / "finetuned" else []
                expected = expected[: ends[0]] if len(ends) else expected
                assert found.tolist() == expected.tolist() == generate(model, [prompt], 15)[0].tolist()
            model.close()


def test_sampling_depends_on_seed_and_prompt_alone_and_follows_the_model():
    prompts = [np.array([5, 9, 11]), np.array([5, 9, 12]), np.array([5, 9, 11])]
    with Checkpoint.open(OWNGPT / "finetuned") as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, CPU)
        hold(model, Point(checkpoint))
        one, other, again = generate(model, prompts, 20, Sampling(1.0, 1))
        assert one.tolist() == again.tolist() != other.tolist()
        assert generate(model, prompts[:1], 20, Sampling(1.0, 1))[0].tolist() == one.tolist()
        assert generate(model, prompts[:1], 20, Sampling(1.0, 2))[0].tolist() != one.tolist()
        assert generate(model, prompts[:1], 20, Sampling(1e-6))[0].tolist() == generate(model, prompts[:1], 20)[0].tolist()
        counts = np.bincount([generate(model, prompts[:1], 1, Sampling(1.0, seed))[0][0] for seed in range(400)], minlength=72)
        with torch.no_grad():
            p = model.model(input_ids=torch.tensor([[5, 9, 11]])).logits[0, -1].softmax(-1).numpy()
        assert np.abs(counts / 400 - p).max() < 4 * np.sqrt(0.25 / 400)
        with pytest.raises(BadInput, match="the model's context is 32"):
            generate(model, [np.arange(1, 33)], 1)
        model.close()


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr("liborth_cli.machine.spare_bytes", lambda: 0)
    with Checkpoint.open(OWNGPT / "finetuned") as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, CPU)
        with pytest.raises(OutOfResources, match="generating text needs all weights in memory"):
            hold(model, Point(checkpoint))
        model.close()


def test_a_limit_takes_rows_from_all_over():
    assert evenly(range(10), 4) == [0, 2, 5, 7] and evenly(range(3), 4) == [0, 1, 2] and evenly(range(3), None) == [0, 1, 2]
