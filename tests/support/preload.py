"""Imported by the server that test ranks are forked from: what every rank would otherwise import for many seconds."""

import gc

import torch
import transformers.models.clip.modeling_clip

import univitar_ds.training.loop
from univitar_ds.training.engine.engine import load_deepspeed

__all__ = ["transformers", "univitar_ds"]

load_deepspeed()
torch.optim.AdamW([torch.zeros(1)])  # imports torch's compiler
torch.compile(len)  # and its back end, which DeepSpeed touches while it starts
gc.freeze()  # ranks need not look through all that again
