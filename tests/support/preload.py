"""Preloaded by the server that test ranks are forked from; importing these in every rank would take many seconds."""

import gc

import torch
import transformers.models.clip.modeling_clip

import univitar_ds.training.loop
from univitar_ds.training.engine.engine import load_deepspeed

__all__ = ["transformers", "univitar_ds"]

load_deepspeed()
torch.optim.AdamW([torch.zeros(1)])  # imports torch's compiler
torch.compile(len)  # imports its back end, which DeepSpeed uses at its start
gc.freeze()  # garbage collection in the ranks then skips these objects
