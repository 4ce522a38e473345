"""Settings of the shortest run of training that makes a whole checkpoint; later ones win."""

SHORT_RUN = (
    "train.steps=2",
    "train.batch=2",
    "train.accumulation=1",
    "train.precision=fp32",
    "train.save_every=2",
    "train.eval_every=2",
    "train.log_every=1",
    "train.gradient_checkpointing=false",
    "data.count=4",
    "data.eval_count=2",
    "lora.rank=4",
)
