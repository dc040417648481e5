"""The merge engine: a recipe and a pool become tensors, in the live model or on their way to disk.

plan: what a recipe means for a pool, and the plain definition of a merge. live: `Engine`, the live model that takes on
candidate after candidate. streaming: from files to files. residency: where the parents live. kernels: the fast paths.
"""

from __future__ import annotations
