"""The benchmark suite: verify, then time, beside torch.nn and ONNX Runtime."""
