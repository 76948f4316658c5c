"""DeepSpeed configurations that ship with the trainer; README.md in this folder says which to take."""
