"""What the project makes and measures itself with; no part of the package. Run from the repository's root:
`python -m scripts.bench.racing`.
"""
