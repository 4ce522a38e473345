"""Experiments: what the pages in docs/results report, each a module that runs as
`python -m lvr_lite.bench.experiments.NAME`. `runner` holds what they share.
"""
