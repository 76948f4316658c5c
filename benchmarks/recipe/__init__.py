"""The parts of bench_recipe.py: its arms, their runs, timm's encoder in a plain loop, and the table."""
