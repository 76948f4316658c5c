"""Names in a run's folder, for all who write or read one."""

CONFIG = "config.yaml"
DEEPSPEED = "deepspeed.json"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
EVALUATION = "evaluation.json"
