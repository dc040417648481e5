"""The verbs of the command, one file each; inputs: what a configuration names, made ready."""

from __future__ import annotations
