"""Trained models for elsewhere: RobustBench, TorchScript and ONNX, each with a model card."""
