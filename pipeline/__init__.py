"""The library behind the stages: one idea per module, dependencies point from training and evaluation down to threat."""
