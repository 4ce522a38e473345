"""The text decoder of one shape under several runtimes, 4-bit weights, head included: time a token,
prefill, memory, in one run.

    make bench-rivals
    python -m lvr_lite.bench.experiments.rivals --out build/rivals --only "lvr-lite|llama.cpp Q4_0"

The first makes an environment of its own and measures all that is installed there, in about an hour
on two cores. "torch bitsandbytes NF4" is slow: --rounds 3 --steps 4.

Every rival runs in a process of its own, so that memory is its own and thread pools do not meet;
all stay loaded, and one after another takes its turn, in an order shuffled for each round. Weights
are random: times do not hang on them. What an answer's quality would be is not compared here
(`rivals.agree` does); the table says in what each computes. Writes OUT/rivals-PAST.json, and its
table into the page that --page names.
"""
