"""The verbs of the command, one file each.

Several verbs share inputs (what a configuration or a recipe file names, made ready), story (what a model card tells),
best (the winner in the run folder) and progress (how a run goes, on a console that the command gives).
"""

from __future__ import annotations
