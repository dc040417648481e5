"""lm-eval tasks -> per-document scores: `tasks` (load, split), `scoring` (Scorer), `scores` (Scores), `statistics`.

Nothing is imported here: `scores` and `statistics` need numpy only and serve the verbs that score nothing.
"""
