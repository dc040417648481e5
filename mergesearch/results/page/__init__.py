"""A run as one self-contained page, to be read in any browser without a network.

`subject` says what a page is about, `contenders`, `curves`, `depth` and `tradeoffs` make its pictures, `build` makes
the page, `anatomy` what a run notes for it.
"""
