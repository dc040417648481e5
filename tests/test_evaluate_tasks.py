from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("lm_eval")

import yaml
from support.evaluate_tiny import write_group, write_task, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.tasks import load, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    return folder


def load_one(folder, name, **config):
    return load([TaskConfig(task=name, **config)], [str(folder / "tasks")])[0]


def refusal(folder, name, **config) -> str:
    with pytest.raises(UserError) as caught:
        load_one(folder, name, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_lm_eval(folder, tmp_path, monkeypatch):
    """Another folder in the place of lm-eval's own 14,000 task files, which take ten seconds to read."""
    own = tmp_path / "lm_eval_tasks"
    own.mkdir()
    config = yaml.safe_load((folder / "tasks" / "tiny_choice.yaml").read_text())
    (own / "builtin.yaml").write_text(yaml.safe_dump({**config, "task": "builtin"}))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))


class TestLmEvalsOwnTasks:
    def test_by_name(self, folder, small_lm_eval):
        assert load_one(folder, "builtin", metric="acc").size == 24

    def test_in_a_group_of_ones_own(self, folder, small_lm_eval):
        write_group(folder, "tiny_with_builtin", ["tiny_last", "builtin"])
        assert load_one(folder, "tiny_with_builtin", metric="acc").sizes == {"tiny_last": 12, "builtin": 24}

    def test_are_not_read_without_need(self, folder, monkeypatch):
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", "/no/such/folder/manager.py")
        monkeypatch.setattr("lm_eval.tasks._index.TaskIndex._iter_yaml_files", _checked())
        assert load_one(folder, "tiny_choice", metric="acc").size == 24


def _checked():
    def iterate(root):
        assert "/no/such/folder" not in str(root)
        return sorted(root.glob("**/*.yaml"))

    return staticmethod(iterate)


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("tiny_choice", "acc", ("acc", "none", True, "mean", {"multiple_choice"}, 24)),
        ("tiny_mcc", None, ("mcc", "none", True, "jackknife", {"multiple_choice"}, 24)),
        ("tiny_last", "perplexity", ("perplexity", "none", False, "perplexity", {"loglikelihood"}, 12)),
        ("tiny_copy", "exact_match,word", ("exact_match", "word", True, "mean", {"generate_until"}, 12)),
        ("tiny_copy", "exact_match, whole", ("exact_match", "whole", True, "mean", {"generate_until"}, 12)),
        ("tiny_vote", None, ("exact_match", "vote", True, "mean", {"generate_until"}, 12)),
        (
            "tiny_passages",
            "bits_per_byte",
            ("bits_per_byte", "none", False, "bits_per_byte", {"loglikelihood_rolling"}, 12),
        ),
    ],
)
def test_what_a_task_says(folder, name, chosen, expected):
    task = load_one(folder, name, metric=chosen)
    found = (task.metric, task.filter, task.higher_is_better, task.aggregation, task.request_types, task.size)
    assert found == expected
    assert task.label == name
    assert list(task.leaves) == [name]


def test_order_is_the_configurations(folder):
    configs = [TaskConfig(task=name, metric="acc") for name in ("tiny_shots", "tiny_last", "tiny_choice")]
    assert [task.label for task in load(configs, [str(folder / "tasks")])] == ["tiny_shots", "tiny_last", "tiny_choice"]


def test_a_yaml_file_is_a_task(folder):
    task = load_one(folder, str(folder / "tasks" / "tiny_mcc.yaml"))
    assert task.size == 24


@pytest.mark.parametrize(
    ("name", "asked", "shots"),
    [
        ("tiny_choice", None, 0),
        ("tiny_choice", 3, 3),
        ("tiny_shots", None, 2),
        ("tiny_shots", 0, 0),
        ("tiny_zero", 0, 0),
    ],
)
def test_num_fewshot(folder, name, asked, shots):
    task = load_one(folder, name, metric="acc", num_fewshot=asked)
    assert task.leaves[name].config.num_fewshot == shots


class TestRefusals:
    def test_unknown_task(self, folder, tmp_path, small_lm_eval):
        (tmp_path / "mine.yaml").write_text("task: mine\n  broken: [\n")
        with pytest.raises(UserError) as caught:
            load([TaskConfig(task="tiny_chioce", metric="acc")], [str(folder / "tasks"), str(tmp_path)])
        for part in ("unknown task 'tiny_chioce'", "did you mean 'tiny_choice'?", str(folder / "tasks"), "lm_eval ls"):
            assert part in str(caught.value)
        assert re.search(r"mine\.yaml .* could not be read", str(caught.value))

    def test_missing_folder(self, folder):
        with pytest.raises(UserError, match=r"include_path names '/no/such', which is no folder"):
            load([TaskConfig(task="tiny_choice")], ["/no/such"])

    def test_unknown_metric(self, folder):
        message = refusal(folder, "tiny_choice", metric="acc_nrom")
        for part in ("unknown metric 'acc_nrom'", "'tiny_choice'", "did you mean 'acc_norm'?", "known: acc, acc_norm"):
            assert part in message

    def test_metric_needed(self, folder):
        message = refusal(folder, "tiny_choice")
        for part in ("'tiny_choice' has several metrics (acc, acc_norm)", "choose one", "`metric: acc`"):
            assert part in message

    @pytest.mark.parametrize("chosen", ["exact_match", None])
    def test_filter_needed(self, folder, chosen):
        message = refusal(folder, "tiny_copy", metric=chosen)
        for part in ("'tiny_copy'", "several filters", "`exact_match,whole`", "`exact_match,word`"):
            assert part in message

    def test_unknown_filter(self, folder):
        message = refusal(folder, "tiny_copy", metric="exact_match,wrod")
        for part in ("unknown filter 'wrod'", "'tiny_copy'", "did you mean 'word'?", "known: whole, word"):
            assert part in message

    def test_missing_data(self, folder):
        write_task(folder, "tiny_gone", "nowhere", output_type="loglikelihood", doc_to_text="t", doc_to_target="t")
        message = refusal(folder, "tiny_gone")
        for part in ("'tiny_gone'", "data file is missing", "nowhere.jsonl", "tiny_gone.yaml", "working directory"):
            assert part in message

    def test_broken_configuration(self, folder):
        write_task(folder, "tiny_odd", "choice", output_type="multiple_chioce", doc_to_text="question")
        message = refusal(folder, "tiny_odd")
        for part in ("'tiny_odd' cannot be loaded", "multiple_chioce", "tiny_odd.yaml"):
            assert part in message

    def test_metric_unknown_to_lm_eval(self, folder):
        config = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target"}
        write_task(folder, "tiny_typo", "copy", **config, metric_list=[{"metric": "exact_macth"}])
        message = refusal(folder, "tiny_typo")
        for part in ("unknown metric 'exact_macth'", "tiny_typo.yaml", "did you mean 'exact_match'?"):
            assert part in message

    @pytest.mark.parametrize("process_results", [False, True])
    def test_aggregation_unknown_to_lm_eval(self, folder, process_results):
        config = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target"}
        metrics = [{"metric": "exact_match", "aggregation": "maen", "higher_is_better": True}]
        write_task(folder, "tiny_summed", "copy", **config, metric_list=metrics)
        if process_results:
            (folder / "tasks" / "summed.py").write_text("def process_results(doc, results):\n    return {}\n")
            path = folder / "tasks" / "tiny_summed.yaml"
            path.write_text(path.read_text() + "process_results: !function summed.process_results\n")
        for name in ("tiny_summed", str(folder / "tasks" / "tiny_summed.yaml")):
            message = refusal(folder, name)
            for part in ("unknown aggregation 'maen'", "tiny_summed.yaml", "did you mean 'mean'?"):
                assert part in message

    def test_a_task_that_leaves_the_program(self, folder):
        (folder / "tasks" / "leaving.py").write_text("import sys\n\n\ndef text(doc):\n    sys.exit(0)\n")
        write_task(folder, "tiny_leaving", "copy", output_type="generate_until", doc_to_target="target")
        path = folder / "tasks" / "tiny_leaving.yaml"
        path.write_text(path.read_text() + "doc_to_text: !function leaving.text\n")
        message = refusal(folder, "tiny_leaving", metric="exact_match")
        for part in ("'tiny_leaving' cannot be loaded (SystemExit: 0)", "tiny_leaving.yaml"):
            assert part in message

    def test_direction_needed(self, folder):
        config = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target"}
        source = "def process_results(doc, results):\n    return {'length': len(results[0])}\n"
        (folder / "tasks" / "helpers.py").write_text(source)
        write_task(folder, "tiny_length", "copy", **config, metric_list=[{"metric": "length", "aggregation": "mean"}])
        path = folder / "tasks" / "tiny_length.yaml"
        path.write_text(path.read_text() + "process_results: !function helpers.process_results\n")
        assert "'tiny_length' does not say whether a higher length is better" in refusal(folder, "tiny_length")

    @pytest.mark.parametrize(
        ("name", "asked", "parts"),
        [
            ("tiny_shots", 9, ("'tiny_shots' has 8 few-shot examples", "num_fewshot 9 needs 9", "to 8")),
            ("tiny_same", 24, ("'tiny_same' has 24 few-shot examples", "num_fewshot 24 needs 25", "to 23")),
            ("tiny_rule", 24, ("'tiny_rule' has 24 few-shot examples", "the documents that are scored", "to 23")),
            ("tiny_validation", 24, ("'tiny_validation' has 24", "the documents that are scored", "to 23")),
            ("tiny_zero", 2, ("'tiny_zero' sets num_fewshot to 0 itself", "remove num_fewshot 2")),
        ],
    )
    def test_fewshot(self, folder, name, asked, parts):
        shots = yaml.safe_load((folder / "tasks" / "tiny_shots.yaml").read_text())
        same = {**shots, "task": "tiny_same", "fewshot_split": "test"}
        (folder / "tasks" / "tiny_same.yaml").write_text(yaml.safe_dump(same))
        # lm-eval draws from the scored documents, and leaves out the one that is asked in none of these two
        rule = {key: value for key, value in shots.items() if key not in ("fewshot_split", "training_split")}
        (folder / "tasks" / "tiny_rule.yaml").write_text(yaml.safe_dump({**rule, "task": "tiny_rule"}))
        split = {"task": "tiny_validation", "validation_split": "test", "fewshot_split": "test"}
        validation = {key: value for key, value in shots.items() if key != "test_split"} | split
        (folder / "tasks" / "tiny_validation.yaml").write_text(yaml.safe_dump(validation))
        message = refusal(folder, name, metric="acc", num_fewshot=asked)
        for part in parts:
            assert part in message
        if name != "tiny_zero":
            load_one(folder, name, metric="acc", num_fewshot=asked - 1)

    @pytest.mark.parametrize(("key", "part"), [({"doc_to_image": "text"}, "images")])
    def test_unsuitable(self, folder, key, part):
        config = yaml.safe_load((folder / "tasks" / "tiny_last.yaml").read_text())
        (folder / "tasks" / "tiny_bad.yaml").write_text(yaml.safe_dump({**config, **key, "task": "tiny_bad"}))
        message = refusal(folder, "tiny_bad", metric="acc")
        assert "'tiny_bad'" in message and part in message and "not supported" in message


class TestGroups:
    def test_members_are_one_task(self, folder):
        write_group(folder, "tiny_group", ["tiny_choice", "tiny_last"])
        task = load_one(folder, "tiny_group", metric="acc")
        assert task.sizes == {"tiny_choice": 24, "tiny_last": 12}
        assert task.size == 36
        assert task.request_types == {"multiple_choice", "loglikelihood"}
        assert task.place([35, 0, 23, 24]) == {"tiny_choice": [0, 23], "tiny_last": [0, 11]}
        assert task.place([30]) == {"tiny_last": [6]}

    def test_groups_of_groups_and_tags(self, folder):
        write_group(folder, "tiny_outer", ["tiny_inner", "tiny_last"])
        write_group(folder, "tiny_inner", ["tiny_choice", "tiny_shots"])
        assert list(load_one(folder, "tiny_outer", metric="acc").leaves) == ["tiny_choice", "tiny_shots", "tiny_last"]
        for name in ("tiny_tagged_a", "tiny_tagged_b"):
            config = yaml.safe_load((folder / "tasks" / "tiny_choice.yaml").read_text())
            (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**config, "task": name, "tag": "tiny_tag"}))
        assert load_one(folder, "tiny_tag", metric="acc").size == 48

    def test_only_means_over_documents(self, folder):
        write_group(folder, "tiny_ratio", ["tiny_passages", "tiny_passages_too"], "bits_per_byte")
        config = yaml.safe_load((folder / "tasks" / "tiny_passages.yaml").read_text())
        copy = yaml.safe_dump({**config, "task": "tiny_passages_too"})
        (folder / "tasks" / "tiny_passages_too.yaml").write_text(copy)
        message = refusal(folder, "tiny_ratio", metric="bits_per_byte")
        assert "'tiny_ratio' cannot be scored on bits_per_byte" in message and "one by one" in message

    def test_only_weighted_by_size(self, folder):
        write_group(folder, "tiny_unweighted", ["tiny_choice", "tiny_last"], by_size=False)
        message = refusal(folder, "tiny_unweighted", metric="acc")
        assert "weight_by_size" in message and "tiny_choice, tiny_last" in message

    def test_a_member_without_the_metric(self, folder):
        write_group(folder, "tiny_mixed", ["tiny_choice", "tiny_last"], "acc_norm")
        assert "its task 'tiny_last' has no acc_norm,none" in refusal(folder, "tiny_mixed", metric="acc_norm")

    def test_overlap(self, folder):
        write_group(folder, "tiny_group", ["tiny_choice", "tiny_last"])
        configs = [TaskConfig(task=name, metric="acc") for name in ("tiny_last", "tiny_group")]
        with pytest.raises(UserError, match="'tiny_last' is in 'tiny_last' and in 'tiny_group': list it once"):
            load(configs, [str(folder / "tasks")])


class TestSplit:
    @pytest.mark.parametrize("holdout", [0.0, 0.1, 0.25, 0.5, 0.9])
    @pytest.mark.parametrize("limit", [None, 2, 1000])
    def test_parts(self, folder, holdout, limit):
        task = load_one(folder, "tiny_choice", metric="acc")
        parts = split(task, holdout, seed=0, limit=limit)
        assert parts.search == sorted(set(parts.search)) and parts.holdout == sorted(set(parts.holdout))
        assert not set(parts.search) & set(parts.holdout)
        assert len(parts.holdout) == math.ceil(round(holdout * 24, 9))
        assert len(parts.search) == min(24 - len(parts.holdout), limit or 24)
        assert set(parts.search) | set(parts.holdout) <= set(range(24))

    def test_depends_on_seed_label_and_size_alone(self, folder):
        choice, last = load_one(folder, "tiny_choice", metric="acc"), load_one(folder, "tiny_mcc")
        same = load([TaskConfig(task="tiny_choice", metric="acc_norm", num_fewshot=1)], [str(folder / "tasks")])[0]
        assert split(choice, 0.5, 0) == split(same, 0.5, 0) == split(choice, 0.5, 0)
        assert split(choice, 0.5, 0) != split(choice, 0.5, 1)
        assert split(choice, 0.5, 0) != split(last, 0.5, 0)

    def test_is_the_same_for_ever(self, folder):
        parts = split(load_one(folder, "tiny_choice", metric="acc"), 0.25, seed=0)
        assert parts.holdout == FIRST_HOLDOUT

    def test_limit_keeps_the_holdout_and_the_first_documents(self, folder):
        task = load_one(folder, "tiny_choice", metric="acc")
        few, many = split(task, 0.5, 3, limit=4), split(task, 0.5, 3, limit=9)
        assert few.holdout == many.holdout
        assert set(few.search) < set(many.search)

    def test_every_document_is_held_out_by_some_seed(self, folder):
        task = load_one(folder, "tiny_choice", metric="acc")
        counts = [0] * task.size
        for seed in range(400):
            for document in split(task, 0.5, seed).holdout:
                counts[document] += 1
        assert min(counts) > 150 and max(counts) < 250

    @pytest.mark.parametrize(
        ("holdout", "limit", "parts"),
        [
            (0.01, None, ("'tiny_choice' has 24 documents", "holdout 0.01 leaves 1 for the holdout", "change holdout")),
            (0.99, None, ("'tiny_choice' has 24 documents", "leaves 0 for the search", "change holdout")),
            (0.5, 1, ("limit 1 leaves 1 for the search", "raise the limit")),
        ],
    )
    def test_too_few(self, folder, holdout, limit, parts):
        with pytest.raises(UserError) as caught:
            split(load_one(folder, "tiny_choice", metric="acc"), holdout, 0, limit)
        for part in parts:
            assert part in str(caught.value)


# written down once: a run that is taken up again after years must not see its holdout
FIRST_HOLDOUT = [1, 2, 6, 7, 17, 20]
