"""Skills for pools of models: their training examples, and the lm-eval documents on which they are tested.

No document is a training example: the documents are drawn first, and training examples are drawn from what is left.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENTS = 200


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; the answer follows the prompt after one space and ends with the line."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """What one model learns.

    Attributes:
        name: of the model that learns it.
        things: what may be asked about, in an order drawn from a seed.
        example: the example of one thing.
        choices: all answers there are; without any an answer is generated.
        family: what its task's name begins with, before the skill's name.
        longest: tokens of a generated answer at most.
    """

    name: str
    things: Callable[[int], list]
    example: Callable[[object, random.Random], Example]
    choices: tuple[str, ...] = ()
    family: str = "real"
    longest: int = 14

    @property
    def task(self) -> str:
        return f"{self.family}_{self.name}"

    @property
    def metric(self) -> str:
        return "acc" if self.choices else "exact_match"

    def documents(self, seed: int, count: int = DOCUMENTS) -> list[Example]:
        """The first `count` things; no training line is about any of them."""
        rng = random.Random(f"{seed} {self.name} documents")
        return [self.example(thing, rng) for thing in self.things(seed)[:count]]

    def training(self, seed: int, count: int = DOCUMENTS) -> Iterator[Example]:
        """Examples without end, each about a thing that is not in `documents`."""
        rng = random.Random(f"{seed} {self.name} training")
        left = self.things(seed)[count:]
        while True:
            yield self.example(rng.choice(left), rng)


# --- lm-eval tasks ---

CHOICE = """task: {task}
custom_dataset: !function utils.load
dataset_kwargs: {{test: {task}.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [{choices}]
doc_to_target: answer
target_delimiter: " "
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GENERATE = """task: {task}
custom_dataset: !function utils.load
dataset_kwargs: {{test: {task}.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
num_fewshot: 0
generation_kwargs: {{until: ["\\n"], max_gen_toks: {longest}, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: none
    filter:
      - {{function: remove_whitespace}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, skills: Iterable[Skill], seed: int, count: int = DOCUMENTS) -> None:
    """Each skill's YAML and its documents as JSON lines, and the function that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in skills:
        template = CHOICE if skill.choices else GENERATE
        choices = ", ".join(f'"{choice}"' for choice in skill.choices)
        text = template.format(task=skill.task, choices=choices, longest=skill.longest)
        (folder / f"{skill.task}.yaml").write_text(text, encoding="utf-8")
        lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in skill.documents(seed, count)]
        (folder / f"{skill.task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    reader = Path(__file__).resolve().parents[1] / "mergesearch" / "zoo" / "tasks" / "utils.py"
    (folder / "utils.py").write_text(reader.read_text(encoding="utf-8"), encoding="utf-8")
