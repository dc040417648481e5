"""The one table of failures that are known and remain, each with its reason.

A case that fails and is not here fails the harness, and so does an entry whose example fails no more.
"""

from __future__ import annotations

from faults.cases import Known

_SIGNALS = "a signal outside of `run` ends the process at once, without a word (issue 14, number 13)"
_LEFT = "what a kill left half written is not cleared at the next start (issue 14, number 14)"
_BEST = "`best/` is not compared with what was exported, so its damage is not made good (issue 14, number 5)"
_CUT = "a file that is cut while it is mapped (issue 14, number 17)"
_INDEX = "an index may name what is no name, or a file elsewhere (issue 14, numbers 8 and 16)"
_DOCUMENTS = "documents.json is read without a guard (issue 14, number 16)"

CALLS: tuple[Known, ...] = (
    Known("merge: *: term", "merge: rename case/.out.partial-# #1: term", _SIGNALS),
    Known("export: *: term", "export: rename case/.out.partial-# #1: term", _SIGNALS),
    Known("report: *: term", "report: mkdir case/done #1: term", _SIGNALS),
    Known("table: *: term", "table: create case/.table.json.# #1: term", _SIGNALS),
    Known("* case/.out.partial-#*: kill", "merge: create case/.out.partial-#/chat_template.jinja #1: kill", _LEFT),
    Known("* case/.out.partial-#*: torn", "merge: write case/.out.partial-#/config.json #1: torn", _LEFT),
    Known("* case/run/scores/.#.npz.tmp *: kill", "run: create case/run/scores/.#.npz.tmp #6: kill", _LEFT),
    Known("* case/run/scores/.#.npz.tmp *: torn", "run: write case/run/scores/.#.npz.tmp #1: torn", _LEFT),
    Known("* case/run/.*.# *", "run: rename case/run/.config.yaml.# #1: kill", _LEFT),
    Known("* case/run/*/.*.# *", "race: write case/run/learning/.#.# #4: full", _LEFT),
    Known(
        "race: rmdir case/run/scores/blocks/ID *",
        "race: rmdir case/run/scores/blocks/ID #1: denied",
        "an empty folder that could not be removed stays: nothing reads it",
    ),
)
LIMITS: tuple[Known, ...] = (
    Known("merge: cut at read world/base/tokenizer.json", "merge: cut at read world/base/tokenizer.json", _CUT),
    Known("merge: cut at mkdir case/.out.partial-#", "merge: cut at mkdir case/.out.partial-#", _CUT),
)
INPUTS: tuple[Known, ...] = ()
FILES: tuple[Known, ...] = (
    Known(
        "merge: model.safetensors.index.json: weight_map.*",
        "merge: model.safetensors.index.json: weight_map.model.layers.1.self_attn.o_proj.weight in a list",
        _INDEX,
    ),
    Known(
        "merge: model.safetensors.index.json: a tensor outside the folder, *",
        "merge: model.safetensors.index.json: a tensor outside the folder, absolute",
        _INDEX,
    ),
    Known("*: documents.json: *", "export: documents.json: 100 bytes more", _DOCUMENTS),
    Known("run: best/*", "run: best/model.safetensors: empty", _BEST),
)
