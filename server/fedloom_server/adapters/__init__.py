"""Merging the adapters of a round's sites, where it takes more than an average.

    parts.py      the files that belong to a model whose adapter alone travels
    updates.py    updates as whole tensors
    residual.py   FedEx: what the average of products is beyond the product of averages
    stacking.py   FLoRA: the average of products, and new adapters
    merging.py    which of them a round's updates go through, and what comes of it

Files are read a weight at a time; torch may not enter.
"""
