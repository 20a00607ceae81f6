"""Low-rank adapters as files: which weights they change, and how changes are folded into those weights.

Both ends and the console stand on these rooms: what a site computes with, what the coordinator
merges and what an export holds must be the same numbers. Only numpy may enter.

    layout.py  the adapter's tensors and the weights that they change
    folds.py   changes that were folded into the frozen weights, as files
    merged.py  a whole model of base, folds and adapter
"""
